"""A model's linear layers in 4 bits, in place, one layer at a time."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from peftk.nn.dense_linear import is_conv1d
from peftk.nn.nf4_linear import NF4Linear
from peftk.progress import track

logger = logging.getLogger("peftk")


def quantize_model(
    model: nn.Module,
    skip: Sequence[str] = ("lm_head",),
    block_size: int = 64,
    double_quant: bool = True,
    progress: bool = True,
) -> nn.Module:
    """Replace each nn.Linear and Conv1D by an NF4Linear; peak memory is the model and one layer. Returns the model.

    Left dense: modules with a name or a path in ``skip``; those that the model keeps in fp32 (transformers'
    ``_keep_in_fp32_modules``: T5 casts to ``wo.weight.dtype``); weights that another module shares (tied heads).
    A ValueError names the layer where a weight isn't finite; layers before it are quantised by then.
    """
    if type(model) is nn.Linear or is_conv1d(model):
        raise TypeError("model: expected a module that holds linear layers, got a linear layer; use NF4Linear.from_linear")
    kept = {*skip, *_kept_in_fp32(model)}
    names = [name for name, module in model.named_modules() if _is_dense(module) and not _is_kept(name, kept)]
    shared = _shared_weights(model)
    for name in track(names, "quantising to NF4", progress):
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        linear = getattr(parent, child)
        if id(linear.weight) in shared:
            logger.info("%s stays dense: its weight is shared with another module", name)
            continue
        layer = NF4Linear.from_linear(linear, block_size, double_quant, name=f"{name}.weight")
        del linear  # before the next layer is quantised: its floats go now
        setattr(parent, child, layer)
    return model


def _is_dense(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module)


def _is_kept(path: str, kept: set[str]) -> bool:
    return path in kept or any(part in kept for part in path.split("."))


def _kept_in_fp32(model: nn.Module) -> list[str]:
    names: list[str] = []
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        names += list(getattr(model, attribute, None) or ())
    return names


def _shared_weights(model: nn.Module) -> set[int]:
    """ids of the parameters that stand in more than one module."""
    counts: Counter[int] = Counter()
    for module in model.modules():
        counts.update(id(p) for p in module._parameters.values() if isinstance(p, torch.Tensor))
    return {key for key, count in counts.items() if count > 1}
