"""Folders whose linear layers are stored in bitsandbytes' 4-bit form, as models with NF4Linear layers."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from peftk.cli.errors import UserError, require


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
            f"--model {path}: quantised by {kind.get('quant_method')}; expected bitsandbytes' 4-bit form or dense weights"
        )
    if not any(path.glob("*.safetensors")):
        raise UserError(f"--model {path}: the folder has no .safetensors file: save the model with safe_serialization=True")
    reader = import_module("peftk.integrations.transformers")
    model, told = reader.from_bitsandbytes(
        path, transformers.AutoModelForCausalLM, config=config, dtype="auto", local_files_only=True, output_loading_info=True
    )
    meta = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    missing, unexpected = sorted({*told["missing_keys"], *meta}), sorted(told["unexpected_keys"])
    if missing or unexpected:
        raise UserError(f"--model {path}: missing weights {missing}; unexpected weights {unexpected}")
    return model
