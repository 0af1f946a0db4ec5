"""Folders whose linear layers are stored in bitsandbytes' 4-bit form, as models with NF4Linear layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from peftk.cli.errors import UserError, require
from peftk.format.nf4 import NF4Weight
from peftk.nn import NF4Linear


def open_quantised(path: Path, config: Any) -> nn.Module:
    """The causal language model in ``path``; stored bytes are taken as they are. UserError for another kind of quantisation,
    and for files that lack a weight or hold one too many."""
    transformers = require("transformers", "hf")
    kind = config.quantization_config
    kind = kind if isinstance(kind, dict) else kind.to_dict()
    if kind.get("quant_method") != "bitsandbytes" or not kind.get("load_in_4bit"):
        raise UserError(
            f"--model {path}: quantised by {kind.get('quant_method')}; expected bitsandbytes' 4-bit form or dense weights"
        )
    state: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        state |= load_file(file)
    if not state:
        raise UserError(f"--model {path}: the folder has no .safetensors file: save the model with safe_serialization=True")
    del config.quantization_config
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    for name in sorted({key.partition(".weight.quant_state.")[0] for key in state if ".weight.quant_state." in key}):
        _put_quantised(model, name, state)
    wrong = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    _make_buffers(model, config)
    missing = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if missing or wrong.unexpected_keys:
        raise UserError(f"--model {path}: missing weights {missing}; unexpected weights {wrong.unexpected_keys}")
    if (path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model


def _put_quantised(model: nn.Module, name: str, state: dict[str, torch.Tensor]) -> None:
    """An NF4Linear of the stored weight in place of the layer that the config asks for."""
    w4 = NF4Weight.from_state_dict(state, f"{name}.")
    parent, _, child = name.rpartition(".")
    linear = model.get_submodule(name)
    layer = NF4Linear(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        block_size=w4.block_size,
        device="meta",
        dtype=w4.dtype,
    )
    setattr(model.get_submodule(parent), child, layer)


def _make_buffers(model: nn.Module, config: Any) -> None:
    """Buffers that no file holds (the angles of rotary embeddings): modules that own them are built again, off meta."""
    for name, module in list(model.named_modules()):
        if any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
            if not isinstance(module, NF4Linear) and not list(module.parameters(recurse=False)):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, type(module)(config))
