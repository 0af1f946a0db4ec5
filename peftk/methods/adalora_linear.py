"""AdaLoRA on a linear layer (Zhang et al. 2023, section 3.1): y = W x + scale * P (Lambda * (Q x))."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from peftk.methods.adapter import AdapterLayer
from peftk.methods.lora_linear import keep_off_fast_path
from peftk.nn import base_layer
from peftk.nn.dense_linear import add_low_rank

if TYPE_CHECKING:
    from peftk.methods.adalora import AdaLoraConfig

_INIT_STD = 0.02  # of the vectors, as the authors' code has it; the paper says Gaussian
_EPSILON = 1e-5  # HF peft divides by init_r + 1e-5


class Triplets(NamedTuple):
    """One matrix's r triplets: right vectors A (r, k), values E (r, 1), left vectors B (n, r); Q, Lambda and P of the paper."""

    A: torch.Tensor
    E: torch.Tensor
    B: torch.Tensor


class AdaLoraLinear(AdapterLayer):
    """A linear base layer, dense or in 4 bits, with adapters in the form of a singular value decomposition: x (..., k) ->
    (..., n), in the base layer's dtype."""

    def __init__(self, module: nn.Module):
        super().__init__(base_layer(module), module)
        if self.base_layer is not module:
            self.base_layer.register_forward_pre_hook(keep_off_fast_path)
        self.in_features, self.out_features = self.base_layer.in_features, self.base_layer.out_features
        self.lora_A, self.lora_E, self.lora_B = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}

    def adapter_names(self) -> list[str]:
        return list(self.lora_A)

    def add_adapter(self, name: str, r: int, config: AdaLoraConfig) -> None:
        """Fresh triplets, r of them: vectors N(0, 0.02), values zero, or all N(0, 1) where ``init_lora_weights`` is False. The
        scale is alpha / init_r whatever r is: it stays as it was when triplets are pruned."""
        facts = {"device": self.weight.device, "dtype": self.factor_dtype()}
        std = _INIT_STD if config.init_lora_weights else 1.0
        self.lora_A[name] = nn.Parameter(torch.randn(r, self.in_features, **facts).mul_(std))
        self.lora_E[name] = nn.Parameter((torch.zeros if config.init_lora_weights else torch.randn)(r, 1, **facts))
        self.lora_B[name] = nn.Parameter(torch.randn(self.out_features, r, **facts).mul_(std))
        alpha = config.lora_alpha if config.lora_alpha > 0 else config.init_r
        self.scaling[name] = alpha / (config.init_r + _EPSILON)
        self.dropout[name] = config.lora_dropout

    def delete_adapter(self, name: str) -> None:
        for table in (self.lora_A, self.lora_E, self.lora_B, self.scaling, self.dropout):
            del table[name]

    def triplets(self, name: str) -> Triplets:
        """The adapter's parameters."""
        return Triplets(self.lora_A[name], self.lora_E[name], self.lora_B[name])

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return list(self.triplets(name))

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        return {"lora_A": self.lora_A[name], "lora_E": self.lora_E[name], "lora_B": self.lora_B[name]}

    def rank(self, name: str) -> int:
        """Triplets that are left; an adapter with none adds nothing here."""
        return self.lora_A[name].shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows is not None:
            return self._forward_rows(x)
        branches = self._branches(self.running())
        if not branches:
            return self.base_layer.forward(x)
        (A, B, scale, dropout), *others = branches
        return self._add(self.base_layer.forward_low_rank(x, A, B, scale, dropout=dropout), x, others)

    def _forward_rows(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer.forward(x)
        for names, rows in self.rows_of(x.shape[0], x.device).items():
            if branches := self._branches(names):
                y = y.index_copy(0, rows, self._add(y[rows], x[rows], branches))
        return y

    def _branches(self, names: Iterable[str]) -> list[tuple[torch.Tensor, torch.Tensor, float, float]]:
        """(Lambda Q, P, scale, dropout) of each adapter that has triplets left: a LoRA's A and B."""
        return [
            (self.lora_A[n] * self.lora_E[n], self.lora_B[n], self.scaling[n], self.dropout[n] if self.training else 0.0)
            for n in names
            if self.rank(n)
        ]

    @staticmethod
    def _add(y: torch.Tensor, x: torch.Tensor, branches: list) -> torch.Tensor:
        for A, B, scale, dropout in branches:
            y = add_low_rank(y, x, A, B, scale, None, dropout, None)
        return y

    @torch.no_grad()
    def delta_weight(self, name: str) -> torch.Tensor:
        return (self.lora_B[name] @ (self.lora_A[name] * self.lora_E[name])).mul_(self.scaling[name])
