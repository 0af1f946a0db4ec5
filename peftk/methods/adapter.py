"""What every method that wraps modules shares: named adapters on a base layer, switching, merging, and copies of whole modules."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def check_adapter_name(name: str) -> None:
    """ValueError unless ``name`` can stand in a parameter's path."""
    if not isinstance(name, str) or not name or "." in name or name.startswith("__"):
        raise ValueError(f"adapter_name: expected a name without dots, got {name!r}")


class Wrapper(nn.Module):
    """Stands in a model where another module stood, and knows several adapters by name."""

    def __init__(self, original: nn.Module):
        super().__init__()
        self._original = (original,)  # a tuple, so that it is no submodule: detach() puts it back
        self.active: list[str] = []
        self.disabled = 0  # depth of disable_adapters()

    def adapter_names(self) -> list[str]:
        """Names of the adapters that this module has."""
        raise NotImplementedError

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters that training ``name`` changes."""
        raise NotImplementedError

    def delete_adapter(self, name: str) -> None:
        """Drop an adapter's parameters."""
        raise NotImplementedError

    def original(self) -> nn.Module:
        """The module that stood here, with the parameters as they are now."""
        raise NotImplementedError

    def set_active(self, names: Iterable[str]) -> None:
        """Those of ``names`` that this module has, in their order, are used from now on."""
        have = self.adapter_names()
        self.active = [name for name in names if name in have]


class AdapterLayer(Wrapper):
    """A base layer with adapters that add to its output, and that can be merged into its weight."""

    def __init__(self, base_layer: nn.Module, original: nn.Module):
        super().__init__(original)
        self.base_layer = base_layer
        self.merged: list[str] = []
        self._snapshot: Any = None

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's own, which models read for its dtype and device."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.base_layer, "bias", None)

    def original(self) -> nn.Module:
        module = self._original[0]
        if module is not self.base_layer:
            module.weight = self.base_layer.weight
            if getattr(module, "bias", None) is not None:
                module.bias = self.base_layer.bias
        return module

    def running(self) -> list[str]:
        """The adapters that a forward pass adds now: active, not disabled, not merged."""
        return [] if self.disabled else [name for name in self.active if name not in self.merged]

    def delta_weight(self, name: str) -> torch.Tensor:
        """What ``name`` adds to W (n, k), fp32."""
        raise NotImplementedError

    def dense_weight(self) -> torch.Tensor:
        """W as floats; an embedding's layer overrides these four."""
        return self.base_layer.dense_weight()

    def set_dense_weight(self, w: torch.Tensor) -> None:
        self.base_layer.set_dense_weight(w)

    def weight_snapshot(self) -> Any:
        return self.base_layer.weight_snapshot()

    def restore_weight(self, snapshot: Any) -> None:
        self.base_layer.restore_weight(snapshot)

    def merged_weight(self, names: Iterable[str]) -> torch.Tensor:
        """W with the adapters added, fp32, rounded nowhere on the way. W itself stays."""
        w = self.dense_weight().to(torch.float32, copy=True)
        for name in names:
            w += self.delta_weight(name)
        return w

    def merge(self, names: list[str], keep_original: bool) -> None:
        """Store W with the adapters added; ``keep_original`` keeps W's bytes for an exact unmerge."""
        if keep_original and self._snapshot is None:
            self._snapshot = self.weight_snapshot()
        self.set_dense_weight(self.merged_weight(names))
        self.merged += names

    def unmerge(self) -> None:
        """Put W's own bytes back. RuntimeError where they weren't kept."""
        if not self.merged:
            return
        if self._snapshot is None:
            raise RuntimeError("unmerge: expected merge(keep_original=True) before, the original weights were not kept")
        self.restore_weight(self._snapshot)
        self._snapshot, self.merged = None, []


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
        self.modules_to_save[name] = copy.deepcopy(self.original_module).requires_grad_(True)

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return list(self.modules_to_save[name].parameters())

    def delete_adapter(self, name: str) -> None:
        del self.modules_to_save[name]

    def original(self) -> nn.Module:
        return self.original_module

    def current(self) -> nn.Module:
        """The module that a forward pass uses now: of several active adapters the last."""
        return self.original_module if self.disabled or not self.active else self.modules_to_save[self.active[-1]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the wrapper itself lacks (weight, out_features, …) is the current module's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" not in self.__dict__ or "original_module" not in self._modules:
                raise
            return getattr(self.current(), name)
