"""The base's own biases, trained with an adapter (``bias="all"`` or ``"lora_only"``): the original values stay within reach."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from peftk.methods.adapter import AdapterLayer, ModuleToSave


class TrainedBiases:
    """Biases that belong to the adapter ``owner``. The Parameters are the model's own; ``use`` exchanges their values.

    The values are exchanged as ``.data``: the Parameters, and with them an optimizer's states, stay the same objects.
    """

    def __init__(self, model: nn.Module, owner: str, targets: Collection[str] | None):
        self.owner = owner
        self.paths = _paths_with_bias(model, targets)  # of the modules, without ".base_layer"
        self.in_use = True  # the model holds the adapter's values, and ``others`` the original ones
        self.others = {path: p.detach().clone() for path, p in self.parameters(model).items()}

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The bias Parameters by path of their module."""
        return {path: _bias_owner(model.get_submodule(path)).bias for path in self.paths}

    def use(self, model: nn.Module, wanted: bool) -> None:
        """Put the adapter's values (True) or the original ones into the model."""
        if wanted == self.in_use:
            return
        for path, parameter in self.parameters(model).items():
            stored = self.others[path].to(parameter.device, parameter.dtype)
            self.others[path], parameter.data = parameter.data, stored
        self.in_use = wanted

    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The adapter's values under HF peft's keys, without prefix."""
        found = {}
        for path, parameter in self.parameters(model).items():
            inner = ".base_layer" if isinstance(model.get_submodule(path), AdapterLayer) else ""
            found[f"{path}{inner}.bias"] = parameter if self.in_use else self.others[path]
        return found


def _bias_owner(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, AdapterLayer) else module


def _paths_with_bias(model: nn.Module, targets: Collection[str] | None) -> list[str]:
    """Modules that own a bias; of ``targets`` only, if given. Copies of whole modules train their own."""
    paths, inside = [], []
    for path, module in model.named_modules():
        if any(path.startswith(prefix) for prefix in inside):
            continue
        if isinstance(module, AdapterLayer | ModuleToSave):
            inside.append(f"{path}.")
        if isinstance(module, ModuleToSave):
            continue
        has_bias = isinstance(_bias_owner(module)._parameters.get("bias"), nn.Parameter)
        if has_bias and path and (targets is None or path in targets):
            paths.append(path)
    return paths
