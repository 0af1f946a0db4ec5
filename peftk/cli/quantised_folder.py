"""Folders whose linear layers are stored in bitsandbytes' 4-bit form, as models with NF4Linear layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftk.cli.errors import UserError, require
from peftk.files import read_tensors
from peftk.format.nf4 import NF4Weight
from peftk.nn import NF4Linear


def open_quantised(path: Path, config: Any) -> nn.Module:
    """The causal language model in ``path``; stored bytes are taken as they are. UserError for another kind of quantisation,
    and for files that lack a weight or hold one too many."""
    transformers = require("transformers", "hf")
    kind = config.quantization_config
    kind = kind.to_dict() if hasattr(kind, "to_dict") else kind
    if not isinstance(kind, dict):
        raise UserError(f"--model {path}: quantization_config: expected an object, got {kind!r:.200}")
    if kind.get("quant_method") != "bitsandbytes" or not kind.get("load_in_4bit"):
        raise UserError(
            f"--model {path}: quantised by {kind.get('quant_method')}; bitsandbytes' 4-bit form and dense weights are read"
        )
    state: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        state |= read_tensors(file)
    if not state:
        raise UserError(f"--model {path}: the folder has no .safetensors file")
    del config.quantization_config
    model = _empty_model(path, config, state)
    for name in sorted({key.partition(".weight.quant_state.")[0] for key in state if ".weight.quant_state." in key}):
        _put_quantised(model, name, state)
    try:
        wrong = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise UserError(f"--model {path}: {' '.join(str(error).split())}") from error
    model.tie_weights()
    _make_buffers(model, config)
    missing = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if missing or wrong.unexpected_keys:
        raise UserError(f"--model {path}: missing weights {missing}; unexpected weights {wrong.unexpected_keys}")
    if (path / "generation_config.json").is_file():
        try:
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)
        except Exception as error:  # whatever transformers' reader stumbles over
            raise UserError(f"--model {path / 'generation_config.json'}: {error}") from error
    return model


def _empty_model(path: Path, config: Any, state: dict[str, torch.Tensor]) -> nn.Module:
    """Without memory for its weights. Before it is made, no more layers than the files hold."""
    transformers = require("transformers", "hf")
    layers = {number for key in state for number in re.findall(r"\.(\d+)\.", key)}
    told = getattr(config, "num_hidden_layers", len(layers))
    if not isinstance(told, int) or not 0 <= told <= len(layers):
        raise UserError(f"--model {path}: num_hidden_layers: expected at most the files' {len(layers)}, got {told!r:.200}")
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # sizes that don't go together raise whatever a model's code stumbles over
        raise UserError(f"--model {path}: config.json describes no model ({type(error).__name__}: {error})") from error


def _put_quantised(model: nn.Module, name: str, state: dict[str, torch.Tensor]) -> None:
    """An NF4Linear of the stored weight in place of the layer that the config asks for."""
    w4 = NF4Weight.from_state_dict(state, f"{name}.")
    parent, _, child = name.rpartition(".")
    linear = dict(model.named_modules()).get(name)
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{name}.weight: expected a linear layer's, got one of {type(linear).__name__}")
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
