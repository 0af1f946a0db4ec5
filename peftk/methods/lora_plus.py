"""LoRA+ (Hayou et al. 2024): B learns ``ratio`` times as fast as A (section 4)."""

from __future__ import annotations

import math
import numbers
from typing import Any

from torch import nn

from peftk.methods.attach import attached, wrappers
from peftk.methods.lora_embedding import LoraEmbedding


def lora_plus_groups(
    model: nn.Module,
    lr: float,
    ratio: float = 16.0,
    *,
    lr_embedding: float = 1e-6,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer, as HF peft's ``create_loraplus_optimizer`` makes them; empty ones are left out.

    ``lr`` for A and whatever else is trained (whole modules among it), ``lr_embedding`` for adapters of embeddings, and
    ``ratio * lr`` for B and for what has one dimension (DoRA's magnitudes, biases, norms; the last two are not decayed). Each
    group has its ``name``, so that a record of learning rates can say which is which. ValueError for a model without adapters,
    a rate that is negative, or a ratio below 1.
    """
    attached(model)
    for name, value, least in (
        ("lr", lr, 0),
        ("ratio", ratio, 1),
        ("lr_embedding", lr_embedding, 0),
        ("weight_decay", weight_decay, 0),
    ):
        if not isinstance(value, numbers.Real) or not math.isfinite(value) or value < least:
            raise ValueError(f"{name}: expected a number of at least {least}, got {value!r}")
    of_embeddings = {id(p) for _, layer in wrappers(model, LoraEmbedding) for p in layer.parameters()}
    groups: dict[str, dict[str, Any]] = {
        "A": {"lr": lr, "weight_decay": weight_decay},
        "embedding": {"lr": lr_embedding, "weight_decay": weight_decay},
        "B": {"lr": lr * ratio, "weight_decay": weight_decay},
        "B_no_decay": {"lr": lr * ratio, "weight_decay": 0.0},
    }
    of_norms = {id(p) for module in model.modules() if type(module).__name__.endswith("Norm") for p in module.parameters()}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_decayed = path.rpartition(".")[2] != "bias" and id(parameter) not in of_norms
            group = "embedding" if id(parameter) in of_embeddings else _group(path, parameter, is_decayed)
            groups[group].setdefault("params", []).append(parameter)
    return [{"name": name, **group} for name, group in groups.items() if "params" in group]


def _group(path: str, parameter: nn.Parameter, is_decayed: bool) -> str:
    if parameter.ndim == 1 or "lora_B" in path.split("."):
        return "B" if is_decayed else "B_no_decay"
    return "A"
