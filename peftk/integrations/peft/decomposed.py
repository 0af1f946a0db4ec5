"""DoRA in HF peft's layers around an NF4Linear, by the formulas of ``peftk.methods.dora``: W is asked for products only."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from peftk.methods.dora import Norms, scale
from peftk.methods.low_rank import LowRank


class _Magnitudes:
    """HF peft's modules by name as the tensors in them."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.layer.lora_magnitude_vector[name].weight


class Decomposition(LowRank):
    """HF peft's layer in the words of ``peftk.methods.dora``."""

    def __init__(self, layer: nn.Module):
        self.layer, self.norms, self.lora_magnitude_vector = layer, Norms(), _Magnitudes(layer)

    @property
    def training(self) -> bool:
        return self.layer.training

    @property
    def scaling(self) -> dict[str, float]:
        return self.layer.scaling

    @property
    def weight(self) -> torch.Tensor:
        return self.layer.base_layer.weight

    def factor_dtype(self) -> torch.dtype:
        return torch.float32

    def matrix(self) -> torch.Tensor:
        return self.layer.base_layer.dense_weight()

    def matrix_product(self, A: torch.Tensor) -> torch.Tensor:
        return self.layer.base_layer.product(A).T

    def weight_tensors(self) -> list[torch.Tensor]:
        return [self.layer.base_layer.weight, *self.layer.base_layer.buffers()]

    def adapter_parameters(self, name: str) -> list[torch.Tensor]:
        return [self.layer.lora_A[name].weight, self.layer.lora_B[name].weight, self.lora_magnitude_vector[name]]


class OwnForward:
    """In front of HF peft's variant for DoRA: decodes no whole W."""

    @staticmethod
    def forward(module: nn.Module, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        """What HF peft's computes: g (result - bias + s B A x) + bias; with dropout result + (g - 1) W D(x) + g s B A D(x)."""
        dropout, base = module.lora_dropout[active_adapter], module.base_layer
        g, dropped = scale(module.decomposition, active_adapter), dropout(x)
        low = module.lora_B[active_adapter](module.lora_A[active_adapter](dropped)) * module.scaling[active_adapter]
        if isinstance(dropout, nn.Identity) or not module.training:
            beside = result if base.bias is None else result - base.bias
            return result + (g - 1) * beside + g * low
        return result + (g - 1) * base.product(dropped.to(result.dtype)) + g * low


def take_over(variants: dict[str, Any]) -> bool:
    """HF peft's variants by adapter: DoRA's get a forward of ours. Whether there is one."""
    from peft.tuners.lora.variants import DoraLinearVariant

    for name, variant in variants.items():
        if type(variant) is DoraLinearVariant:
            variants[name] = _variant()
    return any(isinstance(variant, OwnForward) for variant in variants.values())


@cache
def _variant_class() -> type:
    """HF peft's, which also merges, with ``OwnForward`` in front; pickle finds it through this function."""
    from peft.tuners.lora.variants import DoraLinearVariant

    return type("FusedDora", (OwnForward, DoraLinearVariant), {"__module__": __name__, "__reduce__": lambda _: (_variant, ())})


def _variant() -> Any:
    return _variant_class()()
