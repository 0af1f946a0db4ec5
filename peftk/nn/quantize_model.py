"""A model's linear layers in 4 bits, in place, one layer at a time."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
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

    Left dense: modules with a name or a path in ``skip``, and all below them; those that the model or a part of it keeps in fp32
    (transformers' ``_keep_in_fp32_modules``: T5 casts to ``wo.weight.dtype``); weights that another module shares (tied heads);
    children of nn.TransformerEncoderLayer (its fast path reads their floats itself). A module that stands at several places is
    quantised once and stays shared. A ValueError names the layer where a weight isn't finite; layers before it are quantised by
    then. TypeError for a model that is itself a linear layer, and for a ``skip`` that is one string.
    """
    if _is_dense(model):
        raise TypeError("model: expected a module that holds linear layers, got a linear layer; use NF4Linear.from_linear")
    if isinstance(skip, str):
        raise TypeError(f"skip: expected a sequence of names, got the string {skip!r}")
    shared = _shared_weights(model)
    for paths in track(_places(model, skip), "quantising to NF4", progress):
        linear = model.get_submodule(paths[0])
        if id(linear.weight) in shared:
            logger.info("%s stays dense: its weight is shared with another module", paths[0])
            continue
        layer = NF4Linear.from_linear(linear, block_size, double_quant, name=f"{paths[0]}.weight")
        del linear  # before the next layer is quantised: its floats go now
        for path in paths:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
    return model


def _is_dense(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module)


def _places(model: nn.Module, skip: Sequence[str]) -> list[list[str]]:
    """The linear layers to quantise, each with every path it has; none of these may be kept."""
    kept, places = {}, defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        kept[path] = (*_kept_in_fp32(module), *(skip if path == "" else ()))
        if _is_dense(module):
            places[id(module)].append(path)
    return [paths for paths in places.values() if not any(_is_kept(path, kept, model) for path in paths)]


def _is_kept(path: str, kept: dict[str, Sequence[str]], model: nn.Module) -> bool:
    """Whether an ancestor of ``path`` keeps it dense: its names are runs of whole parts of the path below it."""
    parts = path.split(".")
    for depth in range(len(parts)):
        ancestor, below = ".".join(parts[:depth]), ".".join(parts[depth:])
        if isinstance(model.get_submodule(ancestor), nn.TransformerEncoderLayer):
            return True
        if any(f".{name}." in f".{below}.weight." for name in kept[ancestor]):
            return True
    return False


def _kept_in_fp32(module: nn.Module) -> list[str]:
    names: list[str] = []
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        names += list(getattr(module, attribute, None) or ())
    return names


def _shared_weights(model: nn.Module) -> set[int]:
    """ids of the parameters that stand in more than one module."""
    counts: Counter[int] = Counter()
    for module in model.modules():
        counts.update(id(p) for p in module._parameters.values() if isinstance(p, torch.Tensor))
    return {key for key, count in counts.items() if count > 1}
