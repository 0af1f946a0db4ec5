"""One device's part of a model that tensor parallelism splits, as a model of its own: fewer heads, and a narrower inner layer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from peftk.nn import NF4Linear
from peftk.nn.tensor_parallel import has_fp32_constants, split_layers

SPLIT = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def config_of_part(config: Any, gpus: int) -> Any:
    """ValueError where heads or inner width aren't multiples of ``gpus``, or the config has other names for them."""
    part = copy.deepcopy(config)
    if getattr(config, "head_dim", None) is None or not getattr(config, "base_model_tp_plan", None):
        raise ValueError(f"sharding: expected a model with a plan for tensor parallelism and head_dim, got {config.model_type}")
    for name in SPLIT:
        if getattr(config, name) % gpus:
            raise ValueError(f"gpus: expected a divisor of {name} = {getattr(config, name)} with tensor parallelism, got {gpus}")
        setattr(part, name, getattr(config, name) // gpus)
    return part


def split_constants(model: nn.Module) -> None:
    """Constants as peftk.nn.tensor_parallel keeps them. ``model``: of ``config_of_part``, quantised, on the meta device.
    ValueError where a row of a part doesn't end with a block."""
    for path, dim in split_layers(model):
        layer = getattr(model.get_submodule(path), "base_layer", model.get_submodule(path))
        if not isinstance(layer, NF4Linear):
            continue
        if layer.in_features % layer.block_size:
            got = f"{layer.in_features} columns in {path}"
            raise ValueError(f"gpus: expected parts whose rows are whole blocks of {layer.block_size} elements, got {got}")
        if has_fp32_constants(layer, layer.absmax.numel(), dim):
            layer.register_buffer("absmax", torch.empty(layer.absmax.shape, dtype=torch.float32, device="meta"), persistent=False)
            layer.register_buffer("absmax_scale", None, persistent=False)
            layer.register_buffer("absmax_offset", None, persistent=False)
            layer.double_quant = False
