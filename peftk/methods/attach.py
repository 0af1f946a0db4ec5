"""Adapters on a model: attach, detach, switch; the same functions for every method. merge.py has merging and disabling.

What a method must bring is one file with a config: ``config.inject(model, name)`` puts modules derived from ``Wrapper`` in place,
all or none, and returns the config to keep.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from peftk.methods.adapter import AdapterLayer, ModuleToSave, Wrapper, check_adapter_name, swap_modules
from peftk.methods.biases import TrainedBiases
from peftk.nn.base import check_module
from peftk.shards import check_whole

logger = logging.getLogger("peftk")
_STATE = "_peftk_adapters"


@dataclass
class Attached:
    """What a model with adapters remembers beside its modules."""

    required_grad: set[str]  # names of the parameters that did before the first adapter
    configs: dict[str, Any] = field(default_factory=dict)  # by adapter name
    trainable: dict[str, bool] = field(default_factory=dict)  # False: loaded for inference
    active: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    kept_original: bool = True  # of the merged ones: whether unmerge is possible
    disabled: int = 0  # depth of disable_adapters()
    biases: TrainedBiases | None = None
    allocators: dict[str, Any] = field(default_factory=dict)  # by adapter name: AdaLoRA's, once they have begun


def attached(model: nn.Module) -> Attached:
    """The model's adapters. ValueError where it has none."""
    state = find_attached(model)
    if state is None:
        raise ValueError(f"model: expected one with adapters (peftk.attach), got a {type(model).__name__} without")
    return state


def find_attached(model: nn.Module) -> Attached | None:
    """The model's adapters, None where it has none."""
    return model.__dict__.get(_STATE)


def wrappers(model: nn.Module, kind: type = Wrapper) -> Iterator[tuple[str, Any]]:
    """(path, module) of each module with adapters; one that stands at several places goes by its first path."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, kind))


def check_config(config: Any) -> None:
    """TypeError for what isn't a method's config."""
    if not callable(getattr(config, "inject", None)):
        raise TypeError(f"config: expected a method's config, LoraConfig for one, got {type(config).__name__}")


def attach(model: nn.Module, config: Any, adapter_name: str = "default") -> nn.Module:
    """Put adapters on ``model``, in place; the rest is frozen, and the new adapter is the active one. Returns the model.

    ValueError: the name is taken, or the config selects nothing or what can't be adapted; the model is then as before.
    """
    check_module(model)
    check_config(config)
    check_new_name(model, adapter_name)
    check_whole(model, "model", "attach before it is split")
    state = find_attached(model)
    if state is None:
        state = Attached({name for name, p in model.named_parameters() if p.requires_grad})
    bias = getattr(config, "bias", "none")
    if bias != "none" and state.biases is not None:
        raise ValueError(f'bias: expected "none", got {bias!r}: the biases are trained with {state.biases.owner!r} already')
    resolved = config.inject(model, adapter_name)
    model.__dict__[_STATE] = state
    state.configs[adapter_name], state.trainable[adapter_name] = resolved, not config.inference_mode
    if bias != "none":
        targets = {path for path, layer in wrappers(model, AdapterLayer) if adapter_name in layer.adapter_names()}
        state.biases = TrainedBiases(model, adapter_name, None if bias == "all" else targets)
    _warn_of_tied_copies(model, adapter_name)
    set_adapter(model, adapter_name)
    return model


def check_new_name(model: nn.Module, adapter_name: str) -> None:
    """ValueError unless an adapter may be attached to ``model`` under this name."""
    check_adapter_name(adapter_name)
    state = find_attached(model)
    if state is not None and adapter_name in state.configs:
        raise ValueError(f"adapter_name: {adapter_name!r} is attached already; attached are {', '.join(state.configs)}")


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Use these adapters from now on, added up where there are several; only they are trained, and of these not the ones loaded
    with ``is_trainable=False``. ValueError for unknown names."""
    state = attached(model)
    names = known(state, names, "names")
    for _, wrapper in wrappers(model):
        wrapper.check_active(names)
    state.active = names
    model.requires_grad_(False)
    for _, wrapper in wrappers(model):
        for name in state.active:
            if name in wrapper.adapter_names():
                for parameter in wrapper.adapter_parameters(name):
                    parameter.requires_grad_(state.trainable[name])
    if state.biases is not None and state.biases.owner in state.active:
        for parameter in state.biases.parameters(model).values():
            parameter.requires_grad_(state.trainable[state.biases.owner])
    refresh(model, state)


def refresh(model: nn.Module, state: Attached) -> None:
    """Tell modules and biases what is in use now."""
    for _, wrapper in wrappers(model):
        wrapper.set_active(state.active)
        wrapper.disabled = state.disabled > 0
    if state.biases is not None:
        is_used = state.biases.owner in [*state.active, *state.merged]
        state.biases.use(model, is_used and not state.disabled)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Drop one adapter; where it was the last one in a place, the original module returns. ValueError for an unknown name,
    RuntimeError for one that is merged."""
    state = attached(model)
    known(state, name, "name")
    if name in state.merged:
        raise RuntimeError(f"name: expected an adapter that isn't merged, got {name!r}; unmerge first")
    if len(state.configs) == 1:
        detach(model)
        return
    if state.biases is not None and state.biases.owner == name:
        state.biases.use(model, False)
        state.biases = None
    for _, wrapper in wrappers(model):
        if name in wrapper.adapter_names():
            wrapper.delete_adapter(name)
    take_out(model, [wrapper for _, wrapper in wrappers(model) if not wrapper.adapter_names()])
    del state.configs[name], state.trainable[name]
    state.allocators.pop(name, None)
    set_adapter(model, [n for n in state.active if n != name])


def detach(model: nn.Module) -> nn.Module:
    """Remove all adapters: the original modules return, with their requires_grad flags, biases included. What is merged stays in
    the weights: ``unmerge`` before gives the original model, ``merge`` before a plain model with the adapter in it. What a start
    took out of a weight (PiSSA, OLoRA, LoftQ) goes back, rounded once to the weight's dtype, and in 4 bits quantised again.
    Returns the model. ValueError where it has no adapters."""
    state = attached(model)
    if state.biases is not None:
        state.biases.use(model, state.biases.owner in state.merged)
    take_out(model, [wrapper for _, wrapper in wrappers(model)])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state.required_grad)
    del model.__dict__[_STATE]
    return model


def take_out(model: nn.Module, gone: list[Wrapper]) -> None:
    """The original modules stand in these wrappers' places again."""
    for wrapper in gone:
        wrapper.leave()
    swap_modules(model, {wrapper: wrapper.original() for wrapper in gone})


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters to give to an optimizer."""
    check_module(model)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def known(state: Attached, names: str | Iterable[str], argument: str) -> list[str]:
    """The names as a list. ValueError, naming the argument, for those that aren't attached."""
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    if unknown := [repr(name) for name in names if name not in state.configs]:
        raise ValueError(f"{argument}: no adapter called {', '.join(unknown)}; attached are {', '.join(state.configs)}")
    return names


def _warn_of_tied_copies(model: nn.Module, adapter_name: str) -> None:
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for path, wrapper in wrappers(model, ModuleToSave):
        if adapter_name in wrapper.adapter_names() and any(owners[id(p)] > 1 for p in wrapper.original_module.parameters()):
            logger.warning("%s: its weight is tied to another module's; the copy that is trained is not", path)
