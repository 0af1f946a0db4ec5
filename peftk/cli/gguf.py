"""Models in a GGUF file, as transformers' classes.

The ``gguf`` package reads the file and decodes its blocks. A plain Llama is renamed here (a third of the time that
transformers' loader takes, bit-equal to it); any other architecture goes through transformers' loader.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from peftk.cli.errors import UserError, require
from peftk.streaming.source import Made

# file key, without "llama." -> LlamaConfig field; a file with any other key is left to transformers
_CONFIG = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "rope.dimension_count": "head_dim",
    "vocab_size": "vocab_size",
}
_TOKENS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SMOLLM_PRE_TOKENIZER = "smollm"
_CONTROL_TOKEN = 3  # llama.cpp's token_type of special tokens


def open_gguf(path: Path) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a GGUF file; the model has fp32 weights, decoded exactly. UserError where it isn't GGUF."""
    require("transformers", "hf")
    if not path.is_file():
        raise UserError(f"--model {path}: no such file; expected a folder, a .gguf file or a known name")
    try:
        reader = _read(path)
        _check_blocks(reader)
        return _model(reader, path), gguf_tokenizer(path, reader)
    except (ImportError, UserError):
        raise
    except Exception as error:  # damaged bytes raise whatever the readers stumble over
        told = str(error).strip().partition("\n")[0] or "nothing more"
        raise UserError(f"--model {path}: not a readable GGUF file ({type(error).__name__}: {told})") from error


def _check_blocks(reader: Any) -> None:
    """Before a model of so many is made. ValueError where the tensors are those of another number."""
    architecture = _value(reader, "general.architecture")
    told, tensors = _value(reader, f"{architecture}.block_count"), [tensor.name for tensor in reader.tensors]
    found = {int(block[1]) for name in tensors if (block := re.match(r"blk\.(\d+)\.", name))}
    if not isinstance(told, int) or found != set(range(len(found))) or len(found) != told:
        raise ValueError(f"{architecture}.block_count: expected the number of the tensors' blocks, {len(found)}, got {told!r}")


def _model(reader: Any, path: Path) -> nn.Module:
    transformers = require("transformers", "hf")
    common = {"dtype": torch.float32, "output_loading_info": True}
    if is_plain_llama(reader):
        config = transformers.LlamaConfig(**llama_config(reader))
        model, told = transformers.LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=llama_weights(reader), **common
        )
    else:
        model, told = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **common)
    if wrong := {
        kind: sorted(map(str, told[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if told[kind]
    }:
        raise ValueError(f"expected every weight of a {type(model).__name__}, got {wrong!r:.300}")
    return model


def gguf_tokenizer(path: Path, reader: Any) -> Any:
    """The tokenizer of a GGUF file."""
    if _value(reader, "tokenizer.ggml.pre") == _SMOLLM_PRE_TOKENIZER:
        return smollm_tokenizer(reader)
    return require("transformers", "hf").AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def gguf_config(path: Path) -> Any:
    """transformers' config of a GGUF file; no weights are decoded. UserError where it isn't GGUF."""
    transformers = require("transformers", "hf")
    reader = _read(path)
    if is_plain_llama(reader):
        return transformers.LlamaConfig(**llama_config(reader))
    return transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


def _read(path: Path) -> Any:
    gguf = require("gguf", "hf")
    try:
        return gguf.GGUFReader(path)
    except ValueError as error:
        raise UserError(f"--model {path}: expected a GGUF file, got one that can't be read ({error})") from error


def is_plain_llama(reader: Any) -> bool:
    """Whether every tensor and every setting of the file has a place in LlamaForCausalLM."""
    if _value(reader, "general.architecture") != "llama":
        return False
    settings = {name.removeprefix("llama.") for name in reader.fields if name.startswith("llama.")}
    return settings <= _CONFIG.keys() and all(_hf_name(tensor.name) for tensor in reader.tensors)


def llama_config(reader: Any) -> dict[str, Any]:
    """The keyword arguments of LlamaConfig."""
    config = {ours: _value(reader, f"llama.{theirs}") for theirs, ours in _CONFIG.items()}
    config |= {ours: _value(reader, theirs) for theirs, ours in _TOKENS.items()}
    config = {name: value for name, value in config.items() if value is not None}
    names = {tensor.name for tensor in reader.tensors}
    config.setdefault("vocab_size", len(reader.fields["tokenizer.ggml.tokens"].data))
    config["attention_bias"] = "blk.0.attn_q.bias" in names
    config["tie_word_embeddings"] = "output.weight" not in names
    return config


def llama_weights(reader: Any) -> dict[str, torch.Tensor]:
    """The state dict of LlamaForCausalLM, fp32; rows of q and k in transformers' order."""
    return {_hf_name(tensor.name): _decoded(reader, tensor) for tensor in reader.tensors}


def llama_tensors(reader: Any, after: Callable[[], None]) -> dict[str, Made]:
    """The same, each decoded when it is read; ``after`` runs when one has been."""

    def decode(tensor: Any) -> torch.Tensor:
        w = _decoded(reader, tensor)
        after()
        return w

    shapes = {tensor.name: [int(size) for size in reversed(tensor.shape)] for tensor in reader.tensors}
    return {_hf_name(t.name): Made(torch.float32, shapes[t.name], partial(decode, t)) for t in reader.tensors}


def _decoded(reader: Any, tensor: Any) -> torch.Tensor:
    from gguf import dequantize

    w = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    heads = _value(reader, "llama.attention.head_count")
    if ".attn_q." in tensor.name:
        w = halves_of_heads(w, heads)
    elif ".attn_k." in tensor.name:
        w = halves_of_heads(w, _value(reader, "llama.attention.head_count_kv") or heads)
    return torch.from_numpy(np.ascontiguousarray(w))


def halves_of_heads(w: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the two coordinates that RoPE turns side by side, transformers half a head apart: within each head,
    rows (0, 1, 2, 3, ...) become (0, 2, ..., 1, 3, ...). w (n, k) or (n,)."""
    pairs = w.reshape(heads, -1, 2, *w.shape[1:])
    return pairs.swapaxes(1, 2).reshape(w.shape)


def smollm_tokenizer(reader: Any) -> Any:
    """The byte-level BPE tokenizer with single digits (llama.cpp's ``smollm``), chat template included."""
    tokenizers = require("tokenizers", "hf")
    transformers = require("transformers", "hf")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    backend.add_special_tokens(special)

    def token(name: str) -> str | None:
        index = _value(reader, f"tokenizer.ggml.{name}_token_id")
        return None if index is None else tokens[index]

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _value(reader, "tokenizer.chat_template")
    return tokenizer


def _hf_name(name: str) -> str | None:
    """A tensor's name in LlamaForCausalLM; None where it has none."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block and block[2] in _IN_BLOCK:
        return f"model.layers.{block[1]}.{_IN_BLOCK[block[2]]}.{block[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{_WHOLE[stem]}.{kind}" if stem in _WHOLE else None


def _value(reader: Any, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()
