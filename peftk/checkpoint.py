"""Adapters to disk and back, in HF peft's files: adapter_config.json and adapter_model.safetensors.

Keys are HF peft's: ``base_model.model.<path>.lora_A.weight`` and so on, without the adapter's name.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from peftk.atomic import write_folder
from peftk.methods.adapter import AdapterLayer, ModuleToSave
from peftk.methods.attach import attach, attached, delete_adapter, set_adapter, trained_biases, wrappers
from peftk.methods.lora import LoraConfig

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
CONFIGS = {config.peft_type: config for config in (LoraConfig,)}


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The adapter's tensors under HF peft's keys; they are the model's own, not copies."""
    config = attached(model).configs[adapter_name]
    tensors: dict[str, torch.Tensor] = {}
    for path, layer in wrappers(model, AdapterLayer):
        if adapter_name in layer.adapter_names():
            tensors |= {f"{PREFIX}{path}.{key}": value for key, value in layer.adapter_tensors(adapter_name).items()}
    for path, module in wrappers(model, ModuleToSave):
        if adapter_name in module.adapter_names():
            saved = module.modules_to_save[adapter_name].state_dict(keep_vars=True)
            tensors |= {f"{PREFIX}{path}.{key}": value for key, value in saved.items()}
    biases = trained_biases(model, config, adapter_name)
    return tensors | {f"{PREFIX}{key}": value for key, value in biases.items()}


def save_adapter(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default") -> Path:
    """Write one adapter to ``folder``, which appears whole; one that holds an adapter already is replaced. Returns the folder.

    ValueError for an unknown adapter; FileExistsError where ``folder`` holds something else.
    """
    state = attached(model)
    if adapter_name not in state.configs:
        raise ValueError(f"adapter_name: no adapter called {adapter_name}; attached are {', '.join(state.configs)}")
    tensors = {key: value.detach().cpu().contiguous() for key, value in adapter_tensors(model, adapter_name).items()}
    with write_folder(folder, marker=CONFIG) as temporary:
        save_file(tensors, temporary / TENSORS, metadata={"format": "pt"})
        config = state.configs[adapter_name].to_dict()
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return Path(folder)


def load_adapter(
    model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default", is_trainable: bool = False
) -> nn.Module:
    """Attach the adapter in ``folder``, written by peftk or by HF peft, and make it the active one. Returns the model.

    Strict: missing and unexpected keys and other shapes are a ValueError that names the file and lists them; so is a config that
    asks for what is not supported. The model is then as before.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    tensors = _read_tensors(folder)
    before = list(attached(model).active) if "_peftk_adapters" in model.__dict__ else []
    attach(model, config, adapter_name)
    try:
        _fill(model, adapter_name, tensors, folder / TENSORS)
    except ValueError:
        delete_adapter(model, adapter_name)
        if before:
            set_adapter(model, before)
        raise
    attached(model).trainable[adapter_name] = is_trainable
    set_adapter(model, adapter_name)
    return model


def _read_config(path: Path) -> LoraConfig:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; a folder with an adapter holds {CONFIG} and {TENSORS}")
    try:
        fields = json.loads(path.read_text())
        kind = fields.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}") from error
    if kind not in CONFIGS:
        raise ValueError(f"{path}: peft_type: expected one of {', '.join(CONFIGS)}, got {kind!r}")
    try:
        return CONFIGS[kind].from_dict(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / TENSORS
    if not path.exists():
        others = ", ".join(sorted(p.name for p in folder.iterdir()))
        raise FileNotFoundError(f"{path}: no such file; the folder holds {others}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from error


@torch.no_grad()
def _fill(model: nn.Module, adapter_name: str, tensors: dict[str, torch.Tensor], path: Path) -> None:
    ours = adapter_tensors(model, adapter_name)
    ours |= {key: value for key, value in _embedding_weights(model, adapter_name).items() if key in tensors}
    missing, unexpected = sorted(set(ours) - set(tensors)), sorted(set(tensors) - set(ours))
    shapes = [
        f"{key}: expected {tuple(ours[key].shape)}, got {tuple(tensors[key].shape)}"
        for key in sorted(set(ours) & set(tensors))
        if ours[key].shape != tensors[key].shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(f"{path}: missing keys {missing}; unexpected keys {unexpected}; other shapes {shapes}")
    for key, tensor in tensors.items():
        ours[key].copy_(tensor)


def _embedding_weights(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The base weight of an adapted embedding, which HF peft may put into the file as well."""
    found = {}
    for path, layer in wrappers(model, AdapterLayer):
        if adapter_name in layer.adapter_names() and isinstance(layer.base_layer, nn.Embedding):
            found[f"{PREFIX}{path}.base_layer.weight"] = layer.base_layer.weight
    return found
