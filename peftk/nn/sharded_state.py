"""The state dict of a 4-bit layer whose tensors are split among processes: one entry for each tensor under its own name, which is
what torch.distributed.checkpoint can save in one number of processes and load in another.

weight uint8 (n, k/2), absmax (its codes or bytes as the layer stores them), absmax_scale, absmax_offset, bias as there are, and
quant_facts: the code, block size, dtype and shape as JSON in uint8, which must be the layer's own on loading.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peftk.shards import is_shard, placed_like

NAMES = ("weight", "bias", "absmax", "absmax_scale", "absmax_offset")
FACTS = "quant_facts"


def is_used(layer: nn.Module) -> bool:
    """Whether the layer's state dict has this form: its absmax is a Parameter, or it is split."""
    return "absmax" in layer._parameters or is_shard(layer.weight)


def quant_facts(layer: nn.Module) -> torch.Tensor:
    """The layer's facts, the same number of bytes for the same facts."""
    facts = {
        "quant_type": layer.quant_type,
        "blocksize": layer.block_size,
        "dtype": str(layer.weight_dtype).removeprefix("torch."),
        "shape": [layer.out_features, layer.in_features],
        "nested": layer.double_quant,
    }
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


def save(layer: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """The layer's own tensors, not copies; of a split one this process's shards as DTensors."""
    for name, tensor in _tensors(layer).items():
        destination[prefix + name] = tensor if keep_vars else tensor.detach()
    destination[prefix + FACTS] = quant_facts(layer)


def load(
    layer: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    assign: bool,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Whole tensors are split as the layer's are. Nothing is loaded where the facts or a shape differ."""
    tensors, facts = _tensors(layer), prefix + FACTS
    keys = {prefix + name for name in tensors}
    missing_keys.extend(sorted(key for key in {*keys, facts} if key not in state_dict))
    if strict:
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in {*keys, facts})
    errors = [
        f"size mismatch for {prefix}{name}: expected {tuple(own.shape)} {own.dtype}, got {tuple(new.shape)} {new.dtype}"
        for name, own in tensors.items()
        if (new := state_dict.get(prefix + name)) is not None
        and (new.shape != own.shape or (name != "bias" and new.dtype != own.dtype))
    ]
    if facts in state_dict and not torch.equal(state_dict[facts].cpu(), ours := quant_facts(layer)):
        errors.append(f"{facts}: expected {_text(ours)}, got {_text(state_dict[facts])}")
    error_msgs.extend(errors)
    for name, own in () if errors else tensors.items():
        if (new := state_dict.get(prefix + name)) is not None:
            _put(layer, name, own, new, assign)
    layer.__dict__.pop("_kept_w4", None)


@torch.no_grad()
def _put(layer: nn.Module, name: str, own: torch.Tensor, new: torch.Tensor, assign: bool) -> None:
    new = placed_like(new.detach(), own)
    if not assign and not own.is_meta:
        own.copy_(new)
    elif isinstance(own, nn.Parameter):
        setattr(layer, name, nn.Parameter(new, requires_grad=own.requires_grad))
    else:
        setattr(layer, name, new)


def _tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name in NAMES if (tensor := getattr(layer, name)) is not None}


def _text(facts: torch.Tensor) -> str:
    if facts.dtype != torch.uint8 or facts.dim() != 1:
        return f"{facts.dtype} {tuple(facts.shape)}"
    return bytes(facts.tolist()).decode(errors="replace")
