"""What resuming needs of AdaLoRA beside parameters and optimizer: which triplets are left, and what the allocators know."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftk.methods.adalora import AdaLoraConfig
from peftk.methods.adalora_layer import AdaLoraLayer
from peftk.methods.adalora_schedule import rank_allocator
from peftk.methods.attach import attached, wrappers
from peftk.methods.compaction import ROWS_OF, put_values


def adalora_state(model: nn.Module) -> dict[str, Any]:
    """By adapter; empty where none is AdaLoRA's. torch.save's, also with weights_only=True."""
    state = attached(model)
    return {
        name: {
            "rank_pattern": config.rank_pattern,
            "ranks": {path: layer.rank(name) for path, layer in _layers(model, name).items()},
            "allocator": state.allocators[name].state_dict() if name in state.allocators else None,
        }
        for name, config in state.configs.items()
        if isinstance(config, AdaLoraConfig)
    }


def restore_adalora(model: nn.Module, saved: dict[str, Any]) -> None:
    """Make the adapters' parameters, the same objects, as large as those that ``saved`` was taken from, their values still to be
    filled in, and let the allocators go on from there. Adapters and layers of ``saved`` that the model doesn't have are left out.
    """
    state = attached(model)
    for name, facts in saved.items():
        if not isinstance(state.configs.get(name), AdaLoraConfig):
            continue
        layers = _layers(model, name)
        for path, rank in facts["ranks"].items():
            if path in layers and layers[path].rank(name) != rank:
                for parameter, dim in zip(layers[path].triplets(name), ROWS_OF, strict=True):
                    shape = (*parameter.shape[:dim], rank, *parameter.shape[dim + 1 :])
                    put_values(parameter, parameter.new_zeros(shape))
        if facts["allocator"] is not None:
            allocator = rank_allocator(model, name)
            allocator.kept = {path: torch.ones(layer.rank(name), dtype=torch.bool) for path, layer in layers.items()}
            allocator.load_state_dict(facts["allocator"])
        state.configs[name].rank_pattern = facts["rank_pattern"]


def _layers(model: nn.Module, name: str) -> dict[str, AdaLoraLayer]:
    return {path: layer for path, layer in wrappers(model, AdaLoraLayer) if name in layer.adapter_names()}
