"""transformers 5 loads through conversions: what makes a PendingLinear's Parameter of the tensors that a file has for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps


class Quantise(ConversionOps):
    """The file's dense weight, which is read just before this and dropped just after."""

    def __init__(self, hf_quantizer: Any):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], *, model: nn.Module, **facts: Any) -> dict[str, nn.Parameter]:
        ((name, tensor),) = ((name, _single(value)) for name, value in input_dict.items())
        return {name: self.hf_quantizer.taken(model, name, tensor)}


class Deserialise(ConversionOps):
    """The file's 4-bit weight and constants, as they are."""

    def __init__(self, hf_quantizer: Any):
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module, full_layer_name: str, **facts: Any
    ) -> dict[str, nn.Parameter]:
        parts = {name: _single(value) for name, value in input_dict.items()}
        if set(parts) == {"weight"}:  # a dense layer, in a file that has others in 4 bits
            return parts
        return {"weight": self.hf_quantizer.taken(model, full_layer_name, parts)}


def _single(value: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    return value[0] if isinstance(value, list) else value
