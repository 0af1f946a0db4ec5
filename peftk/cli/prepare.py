"""From a loaded model to one that trains or generates: dtype, device, 4-bit base."""

from __future__ import annotations

import torch
from torch import nn

import peftk
from peftk.nn.experts import has_other_experts, is_experts

METHODS = ("qlora", "lora")


def prepare_base(model: nn.Module, method: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Frozen, on ``device``, in ``dtype``; with qlora its linear layers are in 4 bits, quantised from the stored weights, and
    norms, embeddings and head in ``dtype``."""
    model.requires_grad_(False)
    if method == "qlora":
        quantise_base(model)
    return model.to(device=device, dtype=dtype)


def quantise_base(model: nn.Module, progress: bool = False, with_experts: bool = True) -> nn.Module:
    """4 bits for every linear layer but the head, whatever its name, and for fused experts; in place. Returns the model.
    ``with_experts=False`` leaves experts dense, which bitsandbytes' form of a checkpoint has no keys for."""
    head = model.get_output_embeddings()
    kept = [name for name, module in model.named_modules() if module is head]
    if not with_experts:
        kept += [name for name, module in model.named_modules() if is_experts(module) or has_other_experts(module)]
    return peftk.quantize_model(model, skip=kept, progress=progress)
