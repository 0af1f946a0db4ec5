"""What methods that wrap modules share: named adapters on a base layer, switching, merging, and copies of whole modules."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# nn.Module's tables of forward and backward hooks.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def check_adapter_name(name: str) -> None:
    """ValueError unless ``name`` can stand in a parameter's path."""
    if not isinstance(name, str) or not name or "." in name or name.startswith("__"):
        raise ValueError(f"adapter_name: expected a name without dots, got {name!r}")
    if hasattr(nn.ParameterDict(), name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"adapter_name: expected a name that torch's containers don't use themselves, got {name!r}")


class Wrapper(nn.Module):
    """Stands in a model where another module stood, and knows several adapters by name."""

    def __init__(self, original: nn.Module):
        super().__init__()
        self._original = (original,)  # in a tuple, so that it is no submodule
        self.active: list[str] = []
        self.merged: list[str] = []
        self.disabled = False
        self.training = original.training

    def adapter_names(self) -> list[str]:
        """Names of the adapters that this module has."""
        raise NotImplementedError

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters that training ``name`` changes."""
        raise NotImplementedError

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What a file of ``name`` holds: the module's own tensors under HF peft's keys, below the module's path."""
        raise NotImplementedError

    def delete_adapter(self, name: str) -> None:
        """Drop an adapter's parameters."""
        raise NotImplementedError

    def original(self) -> nn.Module:
        """The module that stood here, with the weights as they are now: those of a merged adapter stay in."""
        raise NotImplementedError

    def set_active(self, names: Iterable[str]) -> None:
        """Those of ``names`` that this module has, in their order, are used from now on."""
        have = self.adapter_names()
        self.active = [name for name in names if name in have]


class AdapterLayer(Wrapper):
    """A base layer with adapters that add to its output, and that can be merged into its weight.

    Hooks of the module that stood here are shared with this one: they see the adapted output, and outlast it.
    """

    def __init__(self, base_layer: nn.Module, original: nn.Module):
        super().__init__(original)
        self.base_layer = base_layer
        self._snapshot: Any = None  # the weight before a merge
        self._tied: nn.Parameter | None = None  # the shared weight that a merge left for one of its own
        for name in _HOOKS:
            setattr(self, name, getattr(original, name))

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's own, which models read for its dtype and device."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's own."""
        return getattr(self.base_layer, "bias", None)

    def original(self) -> nn.Module:
        module = self._original[0]
        if module is not self.base_layer:
            module.weight = self.base_layer.weight
            if getattr(module, "bias", None) is not None:
                module.bias = self.base_layer.bias
        return module.train(self.training)

    def running(self) -> list[str]:
        """The adapters that a forward pass adds now: active, not disabled, not merged."""
        return [] if self.disabled else [name for name in self.active if name not in self.merged]

    def factor_dtype(self) -> torch.dtype:
        """Adapters are fp32 also beside 4-bit and 16-bit weights, since small steps vanish in 16 bits; fp64 stays fp64."""
        dtype = self.weight.dtype
        return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32

    def delta_weight(self, name: str) -> torch.Tensor:
        """What ``name`` adds to W, in W's shape, fp32."""
        raise NotImplementedError

    def read_weight(self) -> torch.Tensor:
        """W as floats."""
        return self.base_layer.dense_weight()

    def write_weight(self, w: torch.Tensor) -> None:
        """Store W."""
        self.base_layer.set_dense_weight(w)

    def take_snapshot(self) -> Any:
        """W's bytes, a copy."""
        return self.base_layer.weight_snapshot()

    def restore_snapshot(self, snapshot: Any) -> None:
        """Put W's bytes back."""
        self.base_layer.restore_weight(snapshot)

    @torch.no_grad()
    def merged_weight(self, names: Iterable[str]) -> torch.Tensor:
        """W with the adapters added, summed in fp32 and rounded nowhere on the way. W itself stays."""
        first, *others = names
        w = self.delta_weight(first)
        for name in others:
            w += self.delta_weight(name)
        return w.add_(self.read_weight())

    def merge(self, names: list[str], keep_original: bool, is_tied: bool) -> None:
        """Store W with the adapters added; ``keep_original`` keeps W's bytes for an exact unmerge. A weight that ``is_tied`` to
        another module's stays there as it is, and this layer gets one of its own."""
        w = self.merged_weight(names)
        if keep_original:
            self._snapshot = self.take_snapshot()
        if is_tied:
            self._tied = self.base_layer.weight
            self.base_layer.weight = nn.Parameter(self._tied.detach().clone(), requires_grad=self._tied.requires_grad)
        self.write_weight(w)
        self.merged = [*self.merged, *names]

    def unmerge(self) -> None:
        """Put W's own bytes back."""
        if self._tied is not None:
            self.base_layer.weight = self._tied
        self.restore_snapshot(self._snapshot)
        self._snapshot, self._tied, self.merged = None, None, []


class ModuleToSave(Wrapper):
    """A whole module trained per adapter (``modules_to_save``): a copy for each, the original where none is active."""

    def __init__(self, original: nn.Module):
        super().__init__(original)
        self.original_module = original
        self.modules_to_save = nn.ModuleDict()

    def adapter_names(self) -> list[str]:
        return list(self.modules_to_save)

    def add_adapter(self, name: str) -> None:
        """A trainable copy of the original."""
        self.modules_to_save[name] = copy.deepcopy(self.original_module).requires_grad_(True).train(self.training)

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return list(self.modules_to_save[name].parameters())

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        return self.modules_to_save[name].state_dict(keep_vars=True)

    def delete_adapter(self, name: str) -> None:
        del self.modules_to_save[name]

    def original(self) -> nn.Module:
        return self.modules_to_save[self.merged[-1]] if self.merged else self.original_module

    def current(self) -> nn.Module:
        """The module that a forward pass uses now: of several active adapters the last."""
        names = self.active or self.merged
        return self.original_module if self.disabled or not names else self.modules_to_save[names[-1]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the wrapper itself lacks (weight, out_features, …) is the current module's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_module" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.current(), name)


def swap_modules(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put ``new[module]`` wherever ``module`` stands below ``model``: at every place of one that stands at several."""
    by_id = {id(old): module for old, module in new.items()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in by_id:
                setattr(parent, name, by_id[id(child)])
