"""A whole checkpoint by the name that --model takes, with its weights left where they are."""

from __future__ import annotations

import json
import logging
import mmap
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftk.cli import gguf as gguf_files
from peftk.cli.errors import UserError, require
from peftk.cli.named import NAMED, path_of
from peftk.cli.whisper_ct2 import is_whisper_ct2, open_whisper
from peftk.streaming import skeleton
from peftk.streaming.source import Source, from_tensors, open_folder

logger = logging.getLogger("peftk.cli")
CONFIG = "config.json"
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".tflite"}


@dataclass(frozen=True)
class StoredModel:
    """``skeleton`` makes the model on the meta device; ``config`` is config.json; ``write_rest`` writes into a folder what is
    neither config nor weights."""

    source: Source
    config: dict[str, Any]
    skeleton: Callable[[], nn.Module]
    write_rest: Callable[[Path], None]


def open_stored(name: str) -> StoredModel:
    """UserError where the name is no folder, no file and none of NAMED, or holds no checkpoint."""
    transformers = require("transformers", "hf")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = path_of(name) if name in NAMED else Path(name)
    if not path.exists():
        raise UserError(f"--model {name}: no such folder or file, and not the name {' or '.join(map(repr, NAMED))}")
    try:
        if path.is_file():
            return _gguf(path)
        if not (path / CONFIG).is_file():
            raise UserError(f"--model {path}: the folder has no {CONFIG}")
        return _in_memory(*open_whisper(path), path / "model.bin") if is_whisper_ct2(path) else _folder(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {path}: {str(error).strip().splitlines()[0]}") from error


def _folder(path: Path) -> StoredModel:
    transformers = require("transformers", "hf")
    source = open_folder(path)
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))

    def made() -> nn.Module:
        read = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        if hasattr(read, "quantization_config"):
            del read.quantization_config
        return skeleton.skeleton(read)

    return StoredModel(Source(source.groups, (*source.files, path / CONFIG)), config, made, lambda to: _copy_rest(path, to))


def _copy_rest(path: Path, to: Path) -> None:
    """Tokenizer, generation config, licence: all files but weights, their indices and hidden ones."""
    for file in sorted(path.rglob("*")):
        place = file.relative_to(path)
        is_ours = place.name == CONFIG and len(place.parts) == 1
        is_weights = file.suffix in _WEIGHTS or place.name.endswith(".index.json")
        if not file.is_file() or is_ours or is_weights or any(part.startswith(".") for part in place.parts):
            continue
        (to / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, to / place)


def _gguf(path: Path) -> StoredModel:
    gguf = require("gguf", "hf")
    transformers = require("transformers", "hf")
    try:
        reader = gguf.GGUFReader(path)
    except ValueError as error:
        raise UserError(f"--model {path}: not a readable GGUF file ({error})") from error
    if not gguf_files.is_plain_llama(reader):
        return _in_memory(*gguf_files.open_gguf(path), path)
    config = transformers.LlamaConfig(**gguf_files.llama_config(reader))
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.float32
    tensors = gguf_files.llama_tensors(reader, lambda: _forget(reader))
    tokenizer = gguf_files.gguf_tokenizer(path, reader)
    return _made(Source((tensors,), (path,)), config, lambda: skeleton.skeleton(config), tokenizer)


def _forget(reader: Any) -> None:
    """Pages of the mapped file don't count as this process's memory any more."""
    mapped = getattr(reader.data, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _in_memory(model: nn.Module, tokenizer: Any, file: Path) -> StoredModel:
    """Of a format whose tensors must be put together: decoded as a whole."""
    logger.warning("%s: is decoded whole into memory, unlike folders in Hugging Face's format and GGUF files of a Llama", file)
    model.config.architectures = [type(model).__name__]
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or not tensor.numel():
            seen.add(tensor.data_ptr())
            tensors[name] = tensor
    return _made(
        Source((from_tensors(tensors),), (file,)), model.config, lambda: skeleton.skeleton(model.config), tokenizer, model
    )


def _made(source: Source, config: Any, made: Callable[[], nn.Module], tokenizer: Any, model: Any = None) -> StoredModel:
    def write_rest(to: Path) -> None:
        if model is not None and model.can_generate():
            model.generation_config.save_pretrained(to)
        tokenizer.save_pretrained(to)

    return StoredModel(source, json.loads(config.to_json_string()), made, write_rest)
