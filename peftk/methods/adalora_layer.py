"""What AdaLoRA's layers share (Zhang et al. 2023, section 3.1): y = W x + scale * P (Lambda * (Q x)), whatever W is."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from peftk.methods.adapter import AdapterLayer

if TYPE_CHECKING:
    from peftk.methods.adalora import AdaLoraConfig

_INIT_STD = 0.02  # of the vectors, as the authors' code has it; the paper says Gaussian
_EPSILON = 1e-5  # HF peft divides by init_r + 1e-5


class Triplets(NamedTuple):
    """One matrix's r triplets: right vectors A (r, k), values E (r, 1), left vectors B (n, r); Q, Lambda and P of the paper."""

    A: torch.Tensor
    E: torch.Tensor
    B: torch.Tensor


class AdaLoraLayer(AdapterLayer):
    """A base layer with adapters in the form of a singular value decomposition; W counts as a matrix (n, k)."""

    def __init__(self, base_layer: nn.Module, original: nn.Module, n: int, k: int):
        super().__init__(base_layer, original)
        self._shape = n, k
        self.lora_A, self.lora_E, self.lora_B = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}

    def adapter_names(self) -> list[str]:
        return list(self.lora_A)

    def add_adapter(self, name: str, r: int, config: AdaLoraConfig) -> None:
        """Fresh triplets, r of them: vectors N(0, 0.02), values zero, or all N(0, 1) where ``init_lora_weights`` is False. The
        scale is alpha / init_r whatever r is: it stays as it was when triplets are pruned."""
        (n, k), facts = self._shape, {"device": self.weight.device, "dtype": self.factor_dtype()}
        std = _INIT_STD if config.init_lora_weights else 1.0
        self.lora_A[name] = nn.Parameter(torch.randn(r, k, **facts).mul_(std))
        self.lora_E[name] = nn.Parameter((torch.zeros if config.init_lora_weights else torch.randn)(r, 1, **facts))
        self.lora_B[name] = nn.Parameter(torch.randn(n, r, **facts).mul_(std))
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

    @torch.no_grad()
    def delta_weight(self, name: str) -> torch.Tensor:
        return (self.lora_B[name] @ (self.lora_A[name] * self.lora_E[name])).mul_(self.scaling[name])
