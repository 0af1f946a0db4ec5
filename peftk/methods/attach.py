"""Adapters on a model: attach, detach, switch, disable, merge; the same functions for every method.

What a method must bring is one file with a config: ``config.inject(model, name)`` puts modules derived from ``Wrapper`` in place.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from peftk.methods.adapter import AdapterLayer, Wrapper, check_adapter_name
from peftk.methods.lora import replace

logger = logging.getLogger("peftk")
_STATE = "_peftk_adapters"


@dataclass
class Attached:
    """What a model with adapters remembers beside its modules."""

    configs: dict[str, Any] = field(default_factory=dict)  # by adapter name
    trainable: dict[str, bool] = field(default_factory=dict)  # False: loaded for inference
    required_grad: list[str] = field(default_factory=list)  # names of the parameters that did before the first adapter
    active: list[str] = field(default_factory=list)


def attached(model: nn.Module) -> Attached:
    """The model's adapters. ValueError where it has none."""
    state = model.__dict__.get(_STATE)
    if state is None:
        raise ValueError(f"model: expected one with adapters (peftk.attach), got a {type(model).__name__} without")
    return state


def wrappers(model: nn.Module, kind: type = Wrapper) -> Iterator[tuple[str, Any]]:
    """(path, module) of each place where an adapter stands."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, kind))


def attach(model: nn.Module, config: Any, adapter_name: str = "default") -> nn.Module:
    """Put adapters on ``model``, in place; the rest is frozen, the new adapter is the active one. Returns the model.

    ValueError: the name is taken, or the config selects nothing or what can't be adapted; the model is then as before.
    """
    check_adapter_name(adapter_name)
    state = model.__dict__.get(_STATE)
    if state is not None and adapter_name in state.configs:
        raise ValueError(f"adapter_name: {adapter_name!r} is attached already; attached are {', '.join(state.configs)}")
    if state is None:
        state = Attached(required_grad=[name for name, p in model.named_parameters() if p.requires_grad])
    config.inject(model, adapter_name)
    model.__dict__[_STATE] = state
    state.configs[adapter_name], state.trainable[adapter_name] = config, True
    set_adapter(model, adapter_name)
    return model


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Use these adapters from now on, added up where there are several; only they are trained. ValueError for unknown names."""
    state, names = attached(model), [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in names if name not in state.configs]:
        raise ValueError(f"names: no adapter called {', '.join(unknown)}; attached are {', '.join(state.configs)}")
    state.active = names
    model.requires_grad_(False)
    for _, wrapper in wrappers(model):
        wrapper.set_active(names)
        for name in wrapper.active:
            for parameter in wrapper.adapter_parameters(name):
                parameter.requires_grad_(state.trainable[name])
    for name in names:
        if state.trainable[name]:
            for parameter in trained_biases(model, state.configs[name], name).values():
                parameter.requires_grad_(True)


def trained_biases(model: nn.Module, config: Any, adapter_name: str) -> dict[str, nn.Parameter]:
    """The base's own biases that ``config.bias`` trains, by HF peft's names without prefix."""
    found: dict[str, nn.Parameter] = {}
    if getattr(config, "bias", "none") == "none":
        return found
    targets = {path for path, layer in wrappers(model, AdapterLayer) if adapter_name in layer.adapter_names()}
    for path, module in model.named_modules():
        bias = module._parameters.get("bias")
        owner = path.removesuffix(".base_layer")
        if bias is not None and (config.bias == "all" or owner in targets):
            found[f"{path}.bias"] = bias
    return found


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` the model computes without adapters (merged ones stay in the weights)."""
    attached(model)
    places = [module for _, module in wrappers(model)]
    for module in places:
        module.disabled += 1
    try:
        yield
    finally:
        for module in places:
            module.disabled -= 1


def delete_adapter(model: nn.Module, name: str) -> None:
    """Drop one adapter; where it was the last one in a place, the original module returns."""
    state = attached(model)
    if name not in state.configs:
        raise ValueError(f"name: no adapter called {name}; attached are {', '.join(state.configs)}")
    for path, wrapper in list(wrappers(model)):
        if isinstance(wrapper, AdapterLayer) and name in wrapper.merged:
            raise RuntimeError(f"delete_adapter: {name!r} is merged into {path}; unmerge first")
        if name in wrapper.adapter_names():
            wrapper.delete_adapter(name)
        if not wrapper.adapter_names():
            replace(model, path, wrapper.original())
    del state.configs[name], state.trainable[name]
    if state.configs:
        set_adapter(model, [n for n in state.active if n != name])
    else:
        _forget(model, state)


def detach(model: nn.Module) -> nn.Module:
    """Remove all adapters: the original modules return, with their requires_grad flags. What was merged stays in the weights."""
    state = attached(model)
    for path, wrapper in list(wrappers(model)):
        replace(model, path, wrapper.original())
    _forget(model, state)
    return model


def _forget(model: nn.Module, state: Attached) -> None:
    required = set(state.required_grad)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in required)
    del model.__dict__[_STATE]


def merge(
    model: nn.Module, adapter_names: str | Sequence[str] | None = None, safe: bool = True, keep_original: bool = True
) -> nn.Module:
    """Add adapters (the active ones if None) to the weights: all of them in fp32, then one rounding or quantisation a layer.

    ``safe``: every layer is checked for NaN and Inf before any is changed; ValueError names the layer. ``keep_original``: the
    original bytes are kept, so that ``unmerge`` is exact. Warns where a merged weight is shared with another module.
    """
    state = attached(model)
    names = state.active if adapter_names is None else [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    if unknown := [name for name in names if name not in state.configs]:
        raise ValueError(f"adapter_names: no adapter called {', '.join(unknown)}; attached are {', '.join(state.configs)}")
    work = []
    for path, layer in wrappers(model, AdapterLayer):
        here = [name for name in names if name in layer.adapter_names() and name not in layer.merged]
        if here:
            work.append((path, layer, here))
    if safe:
        for path, layer, here in work:
            if not layer.merged_weight(here).isfinite().all():
                raise ValueError(
                    f"{path}: expected finite merged weights, got NaN or Inf from {', '.join(here)}; nothing was merged"
                )
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for path, layer, here in work:
        if owners[id(layer.weight)] > 1:
            logger.warning("%s: the merged weight is shared with another module, whose output changes as well", path)
        layer.merge(here, keep_original)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Put the original bytes back, exactly. RuntimeError where they weren't kept; nothing is changed then."""
    attached(model)
    layers = [(path, layer) for path, layer in wrappers(model, AdapterLayer) if layer.merged]
    for path, layer in layers:
        if layer._snapshot is None:
            raise RuntimeError(f"{path}: merged with keep_original=False, the original weights were not kept")
    for _, layer in layers:
        layer.unmerge()
    return model


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters to give to an optimizer."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
