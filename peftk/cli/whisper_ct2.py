"""Whisper in CTranslate2's form (model.bin, binary version 6), as transformers' WhisperForConditionalGeneration.

The file is a list of named arrays. Projections of queries, keys and values are one array there and three here; a bias of the keys
is zero there and missing here, since it changes nothing under the softmax.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from peftk.cli.errors import UserError, require
from peftk.files import read_json

BINARY_VERSION = 6
FILE = "model.bin"
_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)  # by CTranslate2's type ids; bfloat16 is not numpy's

_PARTS = {
    "conv1": "conv1",
    "conv2": "conv2",
    "layer_norm": "layer_norm",
    "position_encodings/encodings": "embed_positions.weight",
    "embeddings": "embed_tokens",
}
_IN_LAYER = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": "encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
_ENDINGS = {"gamma": "weight", "beta": "bias"}


def is_whisper_ct2(folder: Path) -> bool:
    """Whether a folder holds what ``open_whisper`` reads, by its files' names."""
    return (folder / FILE).is_file() and (folder / "tokenizer.json").is_file() and not (folder / "model.safetensors").is_file()


def open_whisper(folder: Path) -> tuple[nn.Module, Any]:
    """(model with the file's dtype, WhisperTokenizer). UserError where a file isn't what it should be."""
    transformers = require("transformers", "hf")
    arrays = read_arrays(folder / FILE)
    tokenizer = transformers.WhisperTokenizer(tokenizer_file=str(folder / "tokenizer.json"))
    try:
        weights = whisper_weights(arrays)
        model = transformers.WhisperForConditionalGeneration(_config(arrays, weights, tokenizer))
        dtype = weights["model.decoder.embed_tokens.weight"].dtype
        missing, unexpected = model.to(dtype).load_state_dict(weights, strict=False)
    except (KeyError, RuntimeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"--model {folder / FILE}: expected a Whisper model ({error})") from error
    if unexpected or missing != ["proj_out.weight"]:  # tied to the embedding
        raise UserError(f"--model {folder / FILE}: expected a Whisper model; it lacks {missing}, has {unexpected} beside")
    model.tie_weights()
    try:
        model.generation_config = _generation(transformers, folder, model, tokenizer)
    except ValueError as error:
        raise UserError(f"--model {error}") from error
    return model, tokenizer


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """By name, every array of a CTranslate2 file; scalars have shape (). UserError where the file can't be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--model {path}: {error.strerror}") from error
    at = 0

    def take(layout: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + layout, content, at)
        at += struct.calcsize("<" + layout)
        return value

    def text() -> str:
        nonlocal at
        length = take("H")  # with a zero byte at the end
        at += length
        return content[at - length : at - 1].decode()

    try:
        version = take("I")
        if version != BINARY_VERSION:
            raise UserError(f"--model {path}: expected CTranslate2's binary version {BINARY_VERSION}, got {version}")
        spec, _ = text(), take("I")
        if spec != "WhisperSpec":
            raise UserError(f"--model {path}: expected a WhisperSpec, got {spec!r}")
        arrays = {}
        for _ in range(take("I")):
            name = text()
            shape = [take("I") for _ in range(take("B"))]
            dtype, size = np.dtype(_DTYPES[take("B")]).newbyteorder("<"), take("I")
            arrays[name] = np.frombuffer(content, dtype, size // dtype.itemsize, at).reshape(shape)
            at += size
    except (struct.error, IndexError, ValueError) as error:
        raise UserError(f"--model {path}: expected a CTranslate2 file, got one that can't be read ({error})") from error
    return arrays


def whisper_weights(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """transformers' names and shapes. KeyError for an array that has no place."""
    weights: dict[str, torch.Tensor] = {}
    for name, array in arrays.items():
        if array.ndim == 0 or name == "decoder/alignment_heads":
            continue  # settings
        stack, _, rest = name.partition("/")
        value = torch.from_numpy(array.copy())
        layer = re.match(r"layer_(\d+)/", rest)
        path, _, ending = rest[layer.end() if layer else 0 :].rpartition("/")
        where = f"model.{stack}.layers.{layer.group(1)}." if layer else f"model.{stack}."
        if f"{path}/{ending}" in _PARTS:
            weights[where + _PARTS[f"{path}/{ending}"]] = value
            continue
        target = (_IN_LAYER if layer else _PARTS)[path]
        targets = (target,) if isinstance(target, str) else target
        for one, part in zip(targets, value.chunk(len(targets)), strict=True):
            if not (one.endswith("k_proj") and ending == "bias"):
                weights[f"{where}{one}.{_ENDINGS.get(ending, ending)}"] = part.contiguous()
    return weights


def _config(arrays: dict[str, np.ndarray], weights: dict[str, torch.Tensor], tokenizer: Any) -> Any:
    transformers = require("transformers", "hf")
    vocabulary, d = weights["model.decoder.embed_tokens.weight"].shape
    (start,) = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>"])
    return transformers.WhisperConfig(
        vocab_size=vocabulary,
        d_model=d,
        num_mel_bins=weights["model.encoder.conv1.weight"].shape[1],
        encoder_layers=_layers(arrays, "encoder"),
        decoder_layers=_layers(arrays, "decoder"),
        encoder_attention_heads=int(arrays["encoder/num_heads"]),
        decoder_attention_heads=int(arrays["decoder/num_heads"]),
        encoder_ffn_dim=weights["model.encoder.layers.0.fc1.weight"].shape[0],
        decoder_ffn_dim=weights["model.decoder.layers.0.fc1.weight"].shape[0],
        max_source_positions=weights["model.encoder.embed_positions.weight"].shape[0],
        max_target_positions=weights["model.decoder.embed_positions.weight"].shape[0],
        decoder_start_token_id=start,
        bos_token_id=start,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def _layers(arrays: dict[str, np.ndarray], stack: str) -> int:
    return sum(re.fullmatch(rf"{stack}/layer_\d+/ffn/linear_0/weight", name) is not None for name in arrays)


def _settings(path: Path) -> dict[str, Any]:
    """Lists of token ids under suppress_ids and suppress_ids_begin, where there are some."""
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object, got a {type(found).__name__}")
    for name in ("suppress_ids", "suppress_ids_begin"):
        ids = found.get(name)
        if ids is not None and not (isinstance(ids, list) and all(isinstance(i, int) and -1 <= i < 2**31 for i in ids)):
            raise ValueError(f"{path}: {name}: expected token ids, got {ids!r:.200}")
    return found


def _generation(transformers: Any, folder: Path, model: nn.Module, tokenizer: Any) -> Any:
    """What ``generate`` must not say, by the folder's config.json."""
    settings = _settings(folder / "config.json")
    config = model.config
    made = transformers.GenerationConfig(
        max_length=config.max_target_positions,
        decoder_start_token_id=config.decoder_start_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        suppress_tokens=settings.get("suppress_ids"),
        begin_suppress_tokens=settings.get("suppress_ids_begin"),
    )
    (made.no_timestamps_token_id,) = tokenizer.convert_tokens_to_ids(["<|notimestamps|>"])
    made.is_multilingual = False
    return made
