"""Which modules of a model a config selects, by HF peft's rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

# Query and value projections, as LoRA's paper has them (Hu et al. 2021, section 7.1), under each architecture's own names.
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        "llama mistral mixtral qwen2 qwen3 qwen2_moe gemma gemma2 gemma3 gemma3_text cohere olmo olmo2 phi stablelm starcoder2 "
        "smollm3 granite opt bart mbart marian pegasus blenderbot whisper m2m_100".split(),
        ("q_proj", "v_proj"),
    ),
    **dict.fromkeys("bert roberta xlm-roberta electra deberta camembert albert data2vec-text".split(), ("query", "value")),
    **dict.fromkeys("t5 mt5 umt5 longt5".split(), ("q", "v")),
    **dict.fromkeys("bloom gpt_neox falcon".split(), ("query_key_value",)),
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "gptj": ("q_proj", "v_proj"),
    "gpt_neo": ("q_proj", "v_proj"),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "phi3": ("qkv_proj",),
    "mpt": ("Wqkv",),
}


def names_match(path: str, wanted: str | Iterable[str]) -> bool:
    """A string is a regular expression for the whole path; of a list, one entry is the path or its last components."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in wanted)


def pattern_value(pattern: dict[str, Any], path: str, default: Any) -> Any:
    """The value of the first key that, as a regular expression, ends ``path`` at a component; ``default`` if none does."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """The paper's targets for a known architecture; ValueError says what to give for another one."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in DEFAULT_TARGETS:
        raise ValueError(
            f'target_modules: expected names, a regular expression or "all-linear" for a model of type {model_type!r}, which has '
            f"no default targets; got None. Known types: {', '.join(sorted(DEFAULT_TARGETS))}"
        )
    return DEFAULT_TARGETS[model_type]


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes logits of hidden states, where the model says which it is."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def select(
    model: nn.Module, config: Any, is_supported: Callable[[nn.Module], bool], is_ours: Callable[[nn.Module], bool]
) -> list[str]:
    """Paths of the modules that ``config.target_modules`` (and exclude_modules, layers_to_transform, layers_pattern,
    modules_to_save) selects. ``is_supported``: what the method can adapt; ``is_ours``: a wrapper, whose inside is left alone.
    ValueError where nothing matches or a match can't be adapted, naming it."""
    wanted = config.target_modules if config.target_modules is not None else default_targets(model)
    head, inside, found, unsupported = output_head(model), [], [], []
    for path, module in model.named_modules():
        if not path or any(path.startswith(prefix) for prefix in inside):
            continue
        if is_ours(module):
            inside.append(f"{path}.")
        if _is_excluded(path, config):
            continue
        if isinstance(wanted, str) and wanted == "all-linear":
            if (
                is_supported(module)
                and not isinstance(module, nn.Embedding)
                and module is not head
                and not _is_classifier(path, config)
            ):
                found.append(path)
        elif names_match(path, wanted) and _layer_is_wanted(path, config):
            (found if is_supported(module) else unsupported).append(path)
    if unsupported:
        kinds = ", ".join(f"{path} ({type(model.get_submodule(path)).__name__})" for path in unsupported)
        raise ValueError(f"target_modules: expected linear layers, Conv1D or embeddings, got {kinds}")
    if not found:
        have = sorted({path.rpartition(".")[2] for path, module in model.named_modules() if path and is_supported(module)})
        raise ValueError(f"target_modules: {wanted!r} matches no module; the model's adaptable ones are called {', '.join(have)}")
    return found


def _is_excluded(path: str, config: Any) -> bool:
    kept = config.modules_to_save
    return bool(config.exclude_modules and names_match(path, config.exclude_modules)) or bool(kept and names_match(path, kept))


def _is_classifier(path: str, config: Any) -> bool:
    """Heads that transformers' classification models make anew: trained whole, through modules_to_save, or not at all."""
    return config.task_type in ("SEQ_CLS", "TOKEN_CLS") and path.rpartition(".")[2] in ("classifier", "score", "out_proj")


def _layer_is_wanted(path: str, config: Any) -> bool:
    layers = config.layers_to_transform
    if layers is None:
        return True
    patterns = config.layers_pattern
    patterns = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    for pattern in patterns:
        if found := re.match(rf".*\.{pattern}\.(\d+)\.", path):
            return int(found.group(1)) in ([layers] if isinstance(layers, int) else layers)
    return False
