"""From a loaded model to one that trains or generates: dtype, device, 4-bit base."""

from __future__ import annotations

import torch
from torch import nn

import peftk

METHODS = ("qlora", "lora")


def prepare_base(model: nn.Module, method: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Frozen, on ``device``, in ``dtype``; with qlora its linear layers are in 4 bits, quantised from the stored weights, and
    norms, embeddings and head in ``dtype``."""
    model.requires_grad_(False)
    if method == "qlora":
        quantise_base(model)
    return model.to(device=device, dtype=dtype)


def quantise_base(model: nn.Module, progress: bool = False) -> nn.Module:
    """4 bits for every linear layer but the head, whatever its name; in place. Returns the model."""
    head = model.get_output_embeddings()
    return peftk.quantize_model(model, skip=[name for name, module in model.named_modules() if module is head], progress=progress)
