"""Folders of models that bitsandbytes quantised, read and written without bitsandbytes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from peftk.atomic import write_file
from peftk.integrations.transformers.config import NF4Config
from peftk.nn import NF4Linear


def from_bitsandbytes(
    folder: str | os.PathLike, auto_class: Any = None, compute_dtype: torch.dtype | str | None = None, **kwargs: Any
) -> nn.Module:
    """A model whose 4-bit weights (NF4 or FP4, double quantised or not) bitsandbytes wrote, with ``peftk.nn.NF4Linear`` layers
    around the same bytes; bitsandbytes need not be installed. transformers itself takes no other config for such a folder.

    ``folder``: as for from_pretrained; ``auto_class``: AutoModelForCausalLM if None, or any class with ``from_pretrained``, which
    gets ``kwargs``. ValueError where the folder isn't quantised so, or a file in it is damaged.
    """
    auto_class = transformers.AutoModelForCausalLM if auto_class is None else auto_class
    names = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "trust_remote_code", "code_revision")
    config = kwargs.pop("config", None) or transformers.AutoConfig.from_pretrained(
        folder, **{name: kwargs[name] for name in names if name in kwargs}
    )
    stored = getattr(config, "quantization_config", None)
    config.quantization_config = _as_ours(stored, compute_dtype, str(folder)).to_dict()
    _check_storage(stored, kwargs.get("dtype", kwargs.get("torch_dtype")))
    try:
        return auto_class.from_pretrained(folder, config=config, **kwargs)
    except SafetensorError as error:
        raise ValueError(f"folder: expected readable safetensors files in {folder}: {error}") from error
    except (TypeError, KeyError, AttributeError, AssertionError) as error:  # transformers takes a config's values as they are
        raise ValueError(f"folder: {folder} with these arguments makes no model: {type(error).__name__}: {error}") from error


def save_as_bitsandbytes(model: nn.Module, folder: str | os.PathLike, **kwargs: Any) -> None:
    """``model.save_pretrained(folder, **kwargs)`` with a config.json that says bitsandbytes: transformers with bitsandbytes reads
    it, peftk not needed, and ``from_bitsandbytes`` does. The weights' files are the same. ValueError for a model without layers
    in 4 bits, and for one with adapters on it."""
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    facts = {(layer.quant_type, layer.double_quant) for layer in layers}
    if len(facts) != 1:
        raise ValueError(f"model: expected NF4Linear layers of one kind, got {sorted(facts)} of (quant_type, double_quant)")
    if "_peftk_adapters" in vars(model) or getattr(model, "hf_quantizer", None) is None:
        raise ValueError("model: expected one from from_pretrained with an NF4Config, without adapters (peftk.detach)")
    ((quant_type, double_quant),) = facts
    ours = model.hf_quantizer.quantization_config
    model.save_pretrained(folder, **kwargs)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": ours.to_dict()["compute_dtype"] or str(model.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ours.modules_to_not_convert,
    }
    write_file(path, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _as_ours(stored: Any, compute_dtype: torch.dtype | str | None, folder: str) -> NF4Config:
    """The NF4Config of a folder's own config; block sizes and kinds of codes are each weight's own."""
    facts = stored if isinstance(stored, dict) or stored is None else stored.to_dict()
    if facts is None or not facts.get("load_in_4bit"):
        kind = None if facts is None else facts.get("quant_method")
        raise ValueError(f"folder: expected one with bitsandbytes' 4-bit weights, got {folder}, quantised by {kind}")
    skipped = facts.get("llm_int8_skip_modules")
    try:
        NF4Config(modules_to_not_convert=skipped)
    except TypeError as error:
        raise ValueError(f"folder: {folder}: config.json: llm_int8_skip_modules: {error}") from error
    return NF4Config(
        double_quant=bool(facts.get("bnb_4bit_use_double_quant", False)),
        modules_to_not_convert=skipped,
        compute_dtype=compute_dtype,
        quant_type=facts.get("bnb_4bit_quant_type", "fp4"),
    )


def _check_storage(stored: Any, dtype: Any) -> None:
    """Version 4 casts what a file holds as floats, codes under a float's name among them."""
    facts = stored if isinstance(stored, dict) else stored.to_dict()
    storage = facts.get("bnb_4bit_quant_storage") or "uint8"
    is_float = storage in ("float32", "bfloat16", "float16")
    if is_float and transformers.__version__.startswith("4.") and str(dtype).removeprefix("torch.") != storage:
        raise ValueError(f"dtype: expected {storage} for codes that are stored as {storage}, got {dtype}; or use transformers 5")
