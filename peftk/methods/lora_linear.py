"""LoRA on a linear layer (Hu et al. 2021, section 4.1)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftk.methods.adapter import AdapterLayer
from peftk.nn import base_layer
from peftk.nn.dense_linear import add_low_rank

if TYPE_CHECKING:
    from peftk.methods.lora import LoraConfig


def _keep_off_fast_path(module: nn.Module, arguments: Any) -> None:
    """nn.TransformerEncoderLayer's fast path reads the weights itself, without adapters; it keeps off where a hook is found."""


class LoraLinear(AdapterLayer):
    """A linear base layer, dense or in 4 bits, with low-rank branches: x (..., k) -> (..., n), in the base layer's dtype."""

    def __init__(self, module: nn.Module):
        super().__init__(base_layer(module), module)
        if self.base_layer is not module:
            self.base_layer.register_forward_pre_hook(_keep_off_fast_path)
        self.in_features, self.out_features = self.base_layer.in_features, self.base_layer.out_features
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()  # (r, k) and (n, r)
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}

    def adapter_names(self) -> list[str]:
        return list(self.lora_A)

    def add_adapter(self, name: str, r: int, scaling: float, config: LoraConfig) -> None:
        """Fresh factors: A Kaiming-uniform (a = sqrt 5) or Gaussian, B zero."""
        facts = {"device": self.weight.device, "dtype": self.factor_dtype()}
        A, B = torch.zeros(r, self.in_features, **facts), torch.zeros(self.out_features, r, **facts)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if config.init_lora_weights is False:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))
        self.lora_A[name], self.lora_B[name] = nn.Parameter(A), nn.Parameter(B)
        self.scaling[name], self.dropout[name] = scaling, config.lora_dropout

    def delete_adapter(self, name: str) -> None:
        for table in (self.lora_A, self.lora_B, self.scaling, self.dropout):
            del table[name]

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return [self.lora_A[name], self.lora_B[name]]

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        return {"lora_A.weight": self.lora_A[name], "lora_B.weight": self.lora_B[name]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows is not None:
            return self._forward_rows(x)
        names = self.running()
        if not names:
            return self.base_layer.forward(x)
        first, *others = ((self.lora_A[n], self.lora_B[n], self.scaling[n], self._dropout(n)) for n in names)
        y = self.base_layer.forward_low_rank(x, *first[:3], dropout=first[3])
        for A, B, scale, dropout in others:
            y = add_low_rank(y, x, A, B, scale, None, dropout, None)
        return y

    def _forward_rows(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer.forward(x)
        for names, rows in self.rows_of(x.shape[0], x.device).items():
            for n in names:
                factors = self.lora_A[n], self.lora_B[n], self.scaling[n]
                y = y.index_copy(0, rows, add_low_rank(y[rows], x[rows], *factors, None, self._dropout(n), None))
        return y

    def _dropout(self, name: str) -> float:
        return self.dropout[name] if self.training else 0.0

    @torch.no_grad()
    def delta_weight(self, name: str) -> torch.Tensor:
        return (self.lora_B[name] @ self.lora_A[name]).mul_(self.scaling[name])
