"""Adapters to disk and back, in HF peft's files: adapter_config.json and adapter_model.safetensors.

Keys are HF peft's: ``base_model.model.<path>.lora_A.weight`` and so on, without the adapter's name; ``prompt_embeddings`` for
what a prompt's encoder makes. Where an input embedding or an output head is adapted, its own weight is in the file too, since a
model's vocabulary may have been resized for the adapter. A prompt's encoder, which only training needs, has a file of its own.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftk.atomic import carry_over, write_folder
from peftk.files import read_json, read_tensors, read_torch, write_tensors
from peftk.methods.adalora import AdaLoraConfig
from peftk.methods.adapter import AdapterLayer, Beside
from peftk.methods.attach import attach, attached, check_new_name, delete_adapter, find_attached, set_adapter, wrappers
from peftk.methods.lora import LoraConfig
from peftk.methods.lora_rules import check_file
from peftk.methods.p_tuning import PTuningConfig
from peftk.methods.prefix_tuning import PrefixTuningConfig
from peftk.methods.prompt_tuning import PromptTuningConfig
from peftk.shards import is_shard, whole

logger = logging.getLogger("peftk")
CONFIG, TENSORS, OLD_TENSORS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ENCODER = "peftk_encoder.safetensors"
PREFIX = "base_model.model."
PROMPTS = (PrefixTuningConfig, PromptTuningConfig, PTuningConfig)
CONFIGS = {config.peft_type: config for config in (LoraConfig, AdaLoraConfig, *PROMPTS)}
CONFIGS |= {config.PRIVATE: config for config in PROMPTS}
# Names that torch.compile and FSDP put into paths; files never have them.
_TRANSPARENT = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module)\.")


def save_adapter(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default") -> Path:
    """Write one adapter to ``folder``, which appears whole: an adapter that it holds is replaced at once, config and tensors
    together, and other files stay. Returns the folder. ValueError for an unknown adapter; OSError names what can't be written,
    and then the folder is as it was.

    Where tensors are split among processes, every process must call this; they are gathered, and the first process writes.

    The tensors belong on the original weights: an adapter that started in them (PiSSA, OLoRA), which changed them, is saved as
    its difference from the start, a LoRA of twice the rank. ValueError where the weights were quantised after that.
    """
    state = attached(model)
    if adapter_name not in state.configs:
        raise ValueError(f"adapter_name: no adapter called {adapter_name!r}; attached are {', '.join(state.configs)}")
    tensors = adapter_tensors(model, adapter_name, for_file=True) | _vocabulary_tensors(model, adapter_name)
    config = state.configs[adapter_name]
    config = config.for_file() if isinstance(config, LoraConfig) else config
    contents = {TENSORS: tensors, ENCODER: _encoder_tensors(model, adapter_name)}
    if not any(is_shard(value) for content in contents.values() for value in content.values()):
        _write(Path(folder), contents, config)
        return Path(folder)
    contents = {name: {key: whole(value.detach()) for key, value in content.items()} for name, content in contents.items()}
    if torch.distributed.get_rank() == 0:
        _write(Path(folder), contents, config)
    torch.distributed.barrier()
    return Path(folder)


def _write(folder: Path, contents: dict[str, dict[str, torch.Tensor]], config: Any) -> None:
    with write_folder(folder) as new:
        carry_over(folder, new, without=(CONFIG, TENSORS, OLD_TENSORS, ENCODER))
        for name, content in contents.items():
            if content or name == TENSORS:
                content = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in content.items()}
                write_tensors(new / name, content)
                (new / name).chmod(new.stat().st_mode & 0o666)
        (new / CONFIG).write_text(json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")


def load_adapter(
    model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default", is_trainable: bool = False
) -> nn.Module:
    """Attach the adapter in ``folder``, written by peftk or by HF peft, and make it the active one. Returns the model.

    Strict: missing and unexpected keys and other shapes are a ValueError that names the file and lists them; so is a config that
    asks for what is not supported. The model is then as before. FileNotFoundError names a file that isn't there.

    A prompt's encoder comes back with ``is_trainable`` and the file that has it, so that training goes on exactly; otherwise the
    prompt is a plain tensor, also in training, which HF peft's files of encoders leave no choice about.
    """
    check_new_name(model, adapter_name)
    folder = Path(folder)
    config = read_config(folder)
    path, tensors = _read_tensors(folder)
    config.inference_mode = not is_trainable
    _check_fits(config, model, tensors, folder, is_trainable)
    state = find_attached(model)
    before = None if state is None else list(state.active)
    attach_empty(model, config, folder, adapter_name)
    try:
        _load_encoders(model, adapter_name, folder / ENCODER)
        _fill(model, adapter_name, tensors, path)
    except BaseException:
        delete_adapter(model, adapter_name)
        if before is not None:
            set_adapter(model, before)
        raise
    return model


def attach_empty(model: nn.Module, config: Any, folder: Path, adapter_name: str = "default") -> None:
    """Attach the adapter of a folder, whose config this is, without its tensors. ValueError names the folder's config."""
    try:
        if isinstance(config, LoraConfig):
            check_file(config, model)
        attach(model, config, adapter_name)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error


def adapter_tensors(model: nn.Module, adapter_name: str, for_file: bool = False) -> dict[str, torch.Tensor]:
    """The adapter's own tensors under the file's keys; ``for_file``: as a change of the original weights."""
    state = attached(model)
    tensors: dict[str, torch.Tensor] = {}
    beside: dict[str, torch.Tensor] = {}
    for path, wrapper in wrappers(model):
        if adapter_name in wrapper.adapter_names():
            made = wrapper.file_tensors(adapter_name) if for_file else wrapper.adapter_tensors(adapter_name)
            if isinstance(wrapper, Beside):
                beside |= made
            else:
                tensors |= {f"{path}.{key}": value for key, value in made.items()}
    if state.biases is not None and state.biases.owner == adapter_name:
        tensors |= state.biases.tensors(model)
    return {_file_key(key, _prefix(model, adapter_name)): value for key, value in tensors.items()} | beside


def _beside(model: nn.Module, adapter_name: str) -> list[Beside]:
    return [wrapper for _, wrapper in wrappers(model, Beside) if adapter_name in wrapper.adapter_names()]


def _encoder_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """What makes the adapter's prompt in training; empty for plain tensors."""
    return {k: v for wrapper in _beside(model, adapter_name) for k, v in wrapper.encoder_tensors(adapter_name).items()}


def _prefix(model: nn.Module, adapter_name: str) -> str:
    return getattr(attached(model).configs[adapter_name], "FILE_PREFIX", PREFIX)


def _vocabulary_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The base weights of an adapted input embedding and output head, where they are dense."""
    getters = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    vocabulary = [getter() for getter in getters if callable(getter)]
    found = {}
    for path, layer in wrappers(model, AdapterLayer):
        is_dense = layer.weight.dtype.is_floating_point
        if is_dense and adapter_name in layer.adapter_names() and any(layer is module for module in vocabulary):
            found[_file_key(f"{path}.base_layer.weight")] = layer.weight
    return found


def _file_key(key: str, prefix: str = PREFIX) -> str:
    return prefix + _TRANSPARENT.sub("", key)


def read_config(folder: Path) -> Any:
    """The config of the adapter in a folder. FileNotFoundError, or ValueError for what isn't supported, names the file."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a folder with {CONFIG} and {TENSORS}")
    fields = read_json(path)
    kind = fields.get("peft_type") if isinstance(fields, dict) else fields
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise ValueError(f"{path}: peft_type: expected one of {', '.join(CONFIGS)}, got {kind!r}")
    try:
        return CONFIGS[kind].from_dict(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _check_fits(config: Any, model: nn.Module, tensors: dict[str, torch.Tensor], folder: Path, is_trainable: bool) -> None:
    """Before memory is taken for it: a config asks for no size that its files don't have."""
    path = folder / CONFIG
    try:
        if isinstance(config, LoraConfig):
            check_file(config, model)
            _check_sizes(config.ranks(model), tensors, folder / TENSORS)
            return
        encoder = folder / ENCODER
        config.is_plain = not (is_trainable and encoder.is_file())
        if is_trainable and config.is_plain and config.has_encoder():
            logger.warning("%s: no such file; the prompt is trained as a plain tensor, without its encoder", encoder)
        _check_sizes({"num_virtual_tokens": config.num_virtual_tokens}, tensors, folder / TENSORS)
        if not config.is_plain:
            sizes = {name: getattr(config, name, None) for name in ("encoder_hidden_size", "encoder_num_layers")}
            _check_sizes({name: size for name, size in sizes.items() if size}, read_tensors(encoder), encoder)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_sizes(sizes: dict[str, int], tensors: dict[str, torch.Tensor], path: Path) -> None:
    if not tensors:
        raise ValueError(f"missing keys: expected tensors in {path}, got none")
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    for name, size in sizes.items():
        if size > largest:
            raise ValueError(f"{name}: expected a size of at most {largest}, the largest dimension in {path.name}, got {size}")


def _read_tensors(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    path, old = folder / TENSORS, folder / OLD_TENSORS
    if not path.is_file() and old.is_file():
        return old, _named_tensors(old)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file, expected one of an adapter; there are {', '.join(sorted(p.name for p in folder.iterdir()))}"
        )
    return path, read_tensors(path)


def _named_tensors(path: Path) -> dict[str, torch.Tensor]:
    found = read_torch(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected tensors by name, got a {type(found).__name__}")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: expected tensors by name, got a {type(value).__name__} called {key!r}")
    return found


def _load_encoders(model: nn.Module, adapter_name: str, path: Path) -> None:
    """Fill the encoders from their file, where the adapter has some."""
    if not (ours := _encoder_tensors(model, adapter_name)):
        return
    tensors = read_tensors(path)
    _check_same(path, "the encoder's tensors", ours, tensors)
    with torch.no_grad():
        for key, value in tensors.items():
            ours[key].copy_(value)


def _check_same(path: Path, what: str, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """ValueError unless keys and shapes are just the same."""
    shapes = [
        f"{key}: expected {tuple(ours[key].shape)}, got {tuple(theirs[key].shape)}"
        for key in sorted(set(ours) & set(theirs))
        if ours[key].shape != theirs[key].shape
    ]
    problems = {
        "missing keys": sorted(set(ours) - set(theirs)),
        "unexpected keys": sorted(set(theirs) - set(ours)),
        "other shapes": shapes,
    }
    if any(problems.values()):
        told = "; ".join(f"{kind}: {', '.join(found)}" for kind, found in problems.items() if found)
        raise ValueError(f"{path}: expected {what}, got {told}")


@torch.no_grad()
def _fill(model: nn.Module, adapter_name: str, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Copy the file's tensors into the adapter; ValueError, before any is copied, unless keys and shapes are just the same."""
    ours, tensors = matched(model, adapter_name, tensors, path)
    beside = {key: wrapper for wrapper in _beside(model, adapter_name) for key in wrapper.adapter_tensors(adapter_name)}
    vocabulary = {key: value for key, value in _vocabulary_tensors(model, adapter_name).items() if key in tensors}
    for key, value in vocabulary.items():
        if not torch.equal(value, tensors[key].to(value.device, value.dtype)):
            logger.warning("%s: %s differs from the model's; the model takes the file's, for all its adapters", path, key)
    for key, value in tensors.items():
        if key not in beside:
            ours[key].copy_(value)
    for wrapper in dict.fromkeys(beside.values()):
        wrapper.load_tensors(adapter_name, {key: tensors[key] for key, owner in beside.items() if owner is wrapper}, path)


def matched(model: nn.Module, adapter_name: str, tensors: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the adapter's tensors, those of a file), both by the file's keys; base weights of the vocabulary are among them where the
    file has them. ``tensors``: anything with a shape. ValueError unless keys and shapes are just the same."""
    prefix = _prefix(model, adapter_name)
    ours = adapter_tensors(model, adapter_name)
    beside = {key for wrapper in _beside(model, adapter_name) for key in wrapper.adapter_tensors(adapter_name)}
    tensors = {
        key if key in beside else _file_key(key.removeprefix(prefix), prefix): value
        for key, value in tensors.items()
        if not _is_leftover(key)
    }
    ours |= {key: value for key, value in _vocabulary_tensors(model, adapter_name).items() if key in tensors}
    _check_same(path, "the adapter's tensors", ours, tensors)
    return ours, tensors


def file_key(model: nn.Module, adapter_name: str, path: str) -> str:
    """The key of a tensor at a path below the model, in the adapter's file."""
    return _file_key(path, _prefix(model, adapter_name))


def _is_leftover(key: str) -> bool:
    """HF peft with bias="all" writes the biases of a module that is saved whole three times; the plain key counts."""
    return ".original_module." in key or ".modules_to_save." in key
