"""AdaLoRA's pruned triplets really removed: from the parameters, from the optimizer's state, from the products of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftk.methods.adalora import config_of, names_in
from peftk.methods.adalora_layer import AdaLoraLayer
from peftk.methods.attach import attached, wrappers
from peftk.shards import is_shard

ROWS_OF = (0, 0, 1)  # the dimension of A, E and B that counts triplets


def compact(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, adapter_name: str | None = None) -> nn.Module:
    """Remove the pruned triplets of ``adapter_name``, or of all AdaLoRA adapters; the model computes what it did. Returns it.

    Which they are says the allocator once the last pruning is done; of an adapter that none works on, those whose value is 0.
    The Parameters stay the same objects with fewer rows, and lose their gradients; the state that ``optimizer`` has of them is
    cut alike, by its own ``cut_state(parameter, dim, index)`` where it has that method, which is called when the parameter has
    its new shape. The config's ``rank_pattern`` then says what is left, as HF peft's does.

    ValueError, before anything is changed: an adapter that is no AdaLoRA's or whose ranks may still change, one that has only
    zeros, and a state whose layout is not that of the parameter.
    """
    state = attached(model)
    names = names_in(model) if adapter_name is None else [adapter_name]
    for name in names:
        config_of(model, name)
    work = {name: _kept(model, name) for name in names}
    cuts = [cut for name, kept in work.items() for cut in _cuts(model, name, kept)]
    if split := [path for path, parameter, *_ in cuts if is_shard(parameter)]:
        raise ValueError(f"model: expected whole parameters, got one whose {split[0]} is split among processes")
    state_of = {} if optimizer is None else optimizer.state
    by_itself = getattr(optimizer, "cut_state", None)
    for path, parameter, _, _ in cuts if by_itself is None else ():
        _check_state(path, parameter.shape, state_of.get(parameter, {}))
    for _, parameter, rows, dim in cuts:
        index = rows.nonzero()[:, 0].to(parameter.device)
        _cut(parameter, dim, index, {} if by_itself else state_of.get(parameter, {}))
        if by_itself and state_of.get(parameter):
            by_itself(parameter, dim, index)
    for name, kept in work.items():
        _record(state, name, kept)
    return model


def _cuts(model: nn.Module, name: str, kept: dict[str, torch.Tensor]) -> list[tuple[str, nn.Parameter, torch.Tensor, int]]:
    """(path, parameter, rows that stay, the dimension that counts them) of each parameter that loses some."""
    return [
        (path, parameter, rows, dim)
        for path, rows in kept.items()
        for parameter, dim in zip(model.get_submodule(path).triplets(name), ROWS_OF, strict=True)
        if not rows.all()
    ]


def _kept(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """By path which rows stay, (r,) bool."""
    state = attached(model)
    allocator = state.allocators.get(name)
    if allocator is not None and not allocator.is_final:
        raise ValueError(
            f"adapter_name: expected an adapter whose ranks are final, got {name!r} after step {allocator.step}; they are after "
            f"step {allocator.final_step} (total_step - tfinal)"
        )
    if allocator is not None:
        return dict(allocator.kept)
    layers = {path: layer for path, layer in wrappers(model, AdaLoraLayer) if name in layer.adapter_names()}
    kept = {path: (layer.triplets(name).E.detach()[:, 0] != 0).cpu() for path, layer in layers.items()}
    if not any(rows.any() for rows in kept.values()):
        raise ValueError(f"adapter_name: expected an adapter that was trained, got {name!r}, all of whose values are 0")
    return kept


def _check_state(path: str, shape: torch.Size, state: dict[str, Any]) -> None:
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim() and value.shape != shape:
            raise ValueError(
                f"optimizer: expected states of the parameter's shape {tuple(shape)} for {path}, got {key!r} of shape "
                f"{tuple(value.shape)}; compact without it and make a new optimizer"
            )


@torch.no_grad()
def _cut(parameter: nn.Parameter, dim: int, index: torch.Tensor, state: dict[str, Any]) -> None:
    """Keep these rows of a parameter and of the optimizer's tensors of its shape."""
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            state[key] = value.index_select(dim, index.to(value.device))
    put_values(parameter, parameter.detach().index_select(dim, index))


def put_values(parameter: nn.Parameter, new: torch.Tensor) -> None:
    """The Parameter stays the same object, without a gradient; ``new`` may be of another shape."""
    parameter.grad = None
    # Where the last loss is still alive, so is the node that gathers this Parameter's gradient, and it expects the old shape.
    # torch makes a new one when the dtype changes, on the way to the new tensor.
    parameter.data = parameter.data.to(torch.float64 if parameter.dtype != torch.float64 else torch.float32)
    parameter.data = new


def _record(state: Any, name: str, kept: dict[str, torch.Tensor]) -> None:
    """What of init_r rows is left, also where some were gone before."""
    config = state.configs[name]
    pattern = {}
    for path, rows in kept.items():
        before = (config.rank_pattern or {}).get(f"{path}.lora_E", [True] * config.init_r)
        left = iter(rows.tolist())
        pattern[f"{path}.lora_E"] = [flag and next(left) for flag in before]
    config.rank_pattern = pattern
    if name in state.allocators:
        state.allocators[name].rows_are_gone()
