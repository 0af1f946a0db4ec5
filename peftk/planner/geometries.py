"""Models by name, as the config.json that they would have, and configs of folders. No weights are read."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import Any


def _llama(width: int, inner: int, layers: int, heads: int, **other: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        **other,
    }


GEOMETRIES: dict[str, dict[str, Any]] = {
    # Touvron et al. 2023, table 2; the inner widths are those of the released files.
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40),
    "llama-33b": _llama(6656, 17920, 60, 52),
    "llama-65b": _llama(8192, 22016, 80, 64),
    # Brown et al. 2020, table 2.1: OPT has its shape.
    "gpt3-175b": {
        "model_type": "opt",
        "hidden_size": 12288,
        "word_embed_proj_dim": 12288,
        "ffn_dim": 4 * 12288,
        "num_hidden_layers": 96,
        "num_attention_heads": 96,
        "vocab_size": 50257,
        "max_position_embeddings": 2048,
        "dropout": 0.0,
    },
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, num_key_value_heads=4),
    "smollm2-135m": _llama(576, 1536, 30, 9, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
}

# Decoders whose layers are all of one kind: what a step takes is affine in their number.
UNIFORM = frozenset({"llama", "opt", "mistral", "qwen2", "gpt_neox"})


def config_of(model: str | Path) -> Any:
    """transformers' config of a name in GEOMETRIES or a folder with a config.json. ValueError names the model and what was
    expected."""
    transformers = import_module("transformers")
    if str(model) in GEOMETRIES:
        return transformers.AutoConfig.for_model(**copy.deepcopy(GEOMETRIES[str(model)]))
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"{model}: expected a folder with a config.json or one of {', '.join(GEOMETRIES)}")
    try:
        return transformers.AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model}: {str(error).strip().splitlines()[0]}") from error


def with_layers(config: Any, layers: int) -> Any:
    """The same config with so many layers."""
    changed = copy.deepcopy(config)
    changed.num_hidden_layers = layers
    if getattr(changed, "layer_types", None):
        changed.layer_types = changed.layer_types[:layers]
    return changed


def is_uniform(config: Any) -> bool:
    """Whether all its layers are alike."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return config.model_type in UNIFORM and len(kinds) <= 1 and not getattr(config, "use_sliding_window", False)


def skeleton(config: Any, dtype: Any) -> Any:
    """A causal language model on the meta device. ValueError for a config that has none."""
    torch, transformers = import_module("torch"), import_module("transformers")
    if config.is_encoder_decoder or type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise ValueError(f"expected the config of a causal language model, got one of {config.model_type}")
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
