"""From a loaded model to one that trains or generates: dtype, device, 4-bit base."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

import peftk
from peftk.methods.targets import TASK_HEADS
from peftk.nn import DenseLinear, NF4Linear
from peftk.nn.experts import has_other_experts, is_experts


def prepare_base(model: nn.Module, base: str, dtype: torch.dtype, device: torch.device, keep: Sequence[str] = ()) -> nn.Module:
    """Frozen, on ``device``, in ``dtype``; as "nf4" its linear layers are in 4 bits, quantised from the stored weights, and
    norms, embeddings, head and what ``keep`` names in ``dtype``."""
    model.requires_grad_(False)
    if base == "nf4":
        quantise_base(model, keep)
    return model.to(device=device, dtype=dtype)


def for_generation(model: nn.Module, head: str = "dense") -> nn.Module:
    """In eval mode, in place, with the plain nn.Linear that makes its logits as a DenseLinear on the same parameters:
    ``generate`` gives the head the last position of a prompt, whose strides an nn.Linear of torch takes long for. ``head`` "nf4":
    as a copy in 4 bits; embeddings tied to it stay as they are. Returns the model. ValueError where "nf4" finds no such head."""
    if type(found := model.get_output_embeddings()) is nn.Linear:
        model.set_output_embeddings(NF4Linear.from_linear(found) if head == "nf4" else DenseLinear.from_linear(found))
    elif head == "nf4":
        raise ValueError(f"head: expected a model that makes logits with an nn.Linear, got one with {type(found).__name__}")
    return model.eval()


def kept_dense(task_type: str, new: Sequence[str]) -> tuple[str, ...]:
    """What is trained whole, and so is never in 4 bits: a task's head, and ``new`` modules."""
    return (*TASK_HEADS.get(task_type, ()), *new)


def quantise_base(model: nn.Module, keep: Sequence[str] = (), progress: bool = False, with_experts: bool = True) -> nn.Module:
    """4 bits for every linear layer but the head, whatever its name, and what ``keep`` names, and for fused experts; in place.
    Returns the model. ``with_experts=False`` leaves experts dense, which bitsandbytes' form of a checkpoint has no keys for."""
    head = model.get_output_embeddings()
    kept = [name for name, module in model.named_modules() if module is head]
    if not with_experts:
        kept += [name for name, module in model.named_modules() if is_experts(module) or has_other_experts(module)]
    return peftk.quantize_model(model, skip=[*kept, *keep], progress=progress)
