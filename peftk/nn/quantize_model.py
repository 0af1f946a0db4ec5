"""A model's linear layers in 4 bits, in place, one layer at a time."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import nn

from peftk.nn.base import check_module
from peftk.nn.dense_linear import is_conv1d
from peftk.nn.experts import Experts, has_other_experts, is_experts
from peftk.nn.nf4_linear import NF4Linear
from peftk.progress import track
from peftk.shards import check_whole

logger = logging.getLogger("peftk")


def quantize_model(
    model: nn.Module,
    skip: Sequence[str] = ("lm_head",),
    block_size: int = 64,
    double_quant: bool = True,
    progress: bool = True,
) -> nn.Module:
    """Replace each nn.Linear and Conv1D by an NF4Linear, and the 3-D weights of fused experts by an NF4Linear an expert
    (peftk.nn.Experts); peak memory is the model and one layer. Returns the model.

    Left dense: modules with a name or a path in ``skip``, and all below them; those that the model or a part of it keeps in fp32
    (transformers' ``_keep_in_fp32_modules``: T5 casts to ``wo.weight.dtype``); weights that another module shares (tied heads);
    children of nn.TransformerEncoderLayer (its fast path reads their floats itself). A module that stands at several places is
    quantised once and stays shared. A ValueError names the layer where a weight isn't finite; layers before it are quantised by
    then. ValueError, before anything is changed, for experts whose forward pass can't be served one at a time, and for layers
    that are split among processes. TypeError for a model that is itself a linear layer or experts, and for a ``skip`` that is one
    string.
    """
    check_module(model)
    check_skip(skip)
    if _is_dense(model):
        raise TypeError("model: expected a module that holds linear layers, got a linear layer; use NF4Linear.from_linear")
    if is_experts(model):
        raise TypeError("model: expected a module that holds linear layers, got fused experts; use peftk.nn.Experts")
    shared = _shared_weights(model)
    places = _Places(model, skip)
    for paths in places.found:
        check_whole(model.get_submodule(paths[0]), "model", "quantise before it is split", paths[0])
    for paths in track(places.found, "quantising to NF4", progress):
        module = model.get_submodule(paths[0])
        weights = [module.weight] if _is_dense(module) else list(module._parameters.values())
        if any(id(weight) in shared for weight in weights):
            logger.info("%s stays dense: its weight is shared with another module", paths[0])
        elif _is_dense(module):
            layer = NF4Linear.from_linear(module, block_size, double_quant, name=f"{paths[0]}.weight")
            _put(model, paths, layer)
        else:
            layer = Experts.from_module(module)
            _put(model, paths, layer)
            del module, weights  # the dense parameters go one by one
            for name in layer.projections():
                if not places.is_kept(paths, name):
                    layer.quantize(name, block_size, double_quant, paths[0])
    return model


def quantizable(model: nn.Module, skip: Sequence[str] = ("lm_head",)) -> set[str]:
    """Paths of the linear layers that ``quantize_model`` would replace: each one's every path."""
    check_module(model)
    check_skip(skip)
    shared = _shared_weights(model)
    found = ((paths, model.get_submodule(paths[0])) for paths in _Places(model, skip).found)
    return {path for paths, module in found if _is_dense(module) and id(module.weight) not in shared for path in paths}


def check_skip(skip: Sequence[str]) -> None:
    """TypeError for one string in the place of several."""
    if isinstance(skip, str):
        raise TypeError(f"skip: expected a sequence of names, got the string {skip!r}")


def _put(model: nn.Module, paths: list[str], layer: nn.Module) -> None:
    for path in paths:
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def _is_dense(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module)


class _Places:
    """The layers to quantise, each with every path it has (``found``); none of these may be kept dense."""

    def __init__(self, model: nn.Module, skip: Sequence[str]):
        self._model, self._kept = model, {}
        places: dict[int, list[str]] = defaultdict(list)
        others: list[tuple[str, nn.Module]] = []
        for path, module in model.named_modules(remove_duplicate=False):
            self._kept[path] = (*_kept_in_fp32(module), *(skip if path == "" else ()))
            if _is_dense(module) or is_experts(module):
                places[id(module)].append(path)
            elif has_other_experts(module):
                others.append((path, module))
        for path, module in others:
            self._refuse(path, module)
        self.found = [paths for paths in places.values() if not self.is_kept(paths, "weight")]

    def is_kept(self, paths: Sequence[str], name: str) -> bool:
        """Whether a parameter of the module at these paths stays dense: an ancestor's names are runs of whole parts of the path
        below it."""
        return any(self._is_kept(f"{path}.{name}".removeprefix(".")) for path in paths)

    def _is_kept(self, path: str) -> bool:
        parts = path.split(".")
        for depth in range(len(parts)):
            ancestor, below = ".".join(parts[:depth]), ".".join(parts[depth:])
            if depth < len(parts) - 1 and isinstance(self._model.get_submodule(ancestor), nn.TransformerEncoderLayer):
                return True
            if any(f".{name}." in f".{below}." for name in self._kept[ancestor]):
                return True
        return False

    def _refuse(self, path: str, module: nn.Module) -> None:
        stacked = [name for name, p in module._parameters.items() if p is not None and p.dim() == 3]
        if not all(self.is_kept([path], name) for name in stacked):
            raise ValueError(
                f"model: expected experts by transformers' protocol, one of whose matrices can be used at a time, got {path}, a "
                f"{type(module).__name__} with {', '.join(stacked)}; skip=({path!r},) leaves them dense"
            )


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
