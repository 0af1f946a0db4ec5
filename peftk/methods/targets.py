"""Which modules of a model a config selects, by HF peft's rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from peftk.methods.adapter import ModuleToSave, Wrapper, swap_modules
from peftk.nn import Experts, NF4Linear

# Query and value projections, as LoRA's paper has them (Hu et al. 2021, section 7.1), under each architecture's own names.
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        "llama llama4 mistral mixtral qwen2 qwen3 qwen2_moe qwen3_moe gemma gemma2 gemma3 gemma3_text cohere cohere2 olmo olmo2 "
        "phi stablelm starcoder2 smollm3 granite opt gptj gpt_neo bart mbart marian pegasus blenderbot whisper m2m_100".split(),
        ("q_proj", "v_proj"),
    ),
    **dict.fromkeys(
        "bert roberta xlm-roberta electra deberta layoutlm camembert albert data2vec-text vit".split(), ("query", "value")
    ),
    **dict.fromkeys("t5 mt5 umt5 longt5".split(), ("q", "v")),
    **dict.fromkeys("bloom gpt_neox falcon chatglm".split(), ("query_key_value",)),
    **dict.fromkeys("gpt2 gpt_bigcode".split(), ("c_attn",)),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "codegen": ("qkv_proj",),
    "phi3": ("qkv_proj",),
    "mpt": ("Wqkv",),
}

# Heads that are made anew for a task. They are trained whole, as HF peft does, and "all-linear" leaves them out.
TASK_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
ALL_LINEAR = "all-linear"


def is_all_linear(wanted: Any) -> bool:
    """HF peft takes it in capitals, too."""
    return isinstance(wanted, str) and wanted.lower() == ALL_LINEAR


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


def output_heads(model: nn.Module) -> list[nn.Module]:
    """The modules that make logits of hidden states: what the model says, and what is called lm_head."""
    getter = getattr(model, "get_output_embeddings", None)
    heads = [module for path, module in model.named_modules() if path.rpartition(".")[2] == "lm_head"]
    return [head for head in (getter() if callable(getter) else None, *heads) if head is not None]


def select(
    model: nn.Module,
    config: Any,
    is_supported: Callable[[nn.Module], bool],
    is_ours: Callable[[nn.Module], bool],
    supported: str = "linear layers, embeddings or convolutions",
) -> list[str]:
    """Paths of the modules that ``config.target_modules`` (with exclude_modules, layers_to_transform, layers_pattern and
    modules_to_save) selects; a module at several places goes by its first.

    ``is_supported``: what the method can adapt, ``supported`` in words; ``is_ours``: a wrapper, whose inside is left alone.
    ValueError where nothing matches, listing what there is, or where a match can't be adapted, naming it and its class.
    """
    wanted = config.target_modules if config.target_modules is not None else default_targets(model)
    modules = visible_modules(model, is_ours)
    if is_all_linear(wanted):
        heads = {id(head) for head in output_heads(model)}
        linear = [path for path, m in modules.items() if is_supported(m) and _is_linear(m) and id(m) not in heads]
        paths = [path for path in linear if not _is_excluded(path, config) and _layer_is_wanted(path, config)]
    else:
        paths = matching(modules, wanted, config)
    if unsupported := [path for path in paths if not is_supported(modules[path])]:
        kinds = ", ".join(f"{path} ({type(modules[path]).__name__})" for path in unsupported[:8])
        raise ValueError(f"target_modules: expected {supported}, got {kinds}")
    if not paths:
        have = sorted({path.rpartition(".")[2] for path, module in modules.items() if is_supported(module)})
        raise ValueError(
            f"target_modules: expected names of the model's layers, got {wanted!r}, which matches none; adaptable layers are "
            f"called {', '.join(have) or 'nothing: there are none'}"
        )
    return paths


def matching(modules: dict[str, nn.Module], wanted: str | Iterable[str], config: Any) -> list[str]:
    """The paths that names or a regular expression select; a whole path in a list is not subject to layers_to_transform."""
    exact = () if isinstance(wanted, str) else wanted
    return [
        path
        for path in modules
        if names_match(path, wanted) and not _is_excluded(path, config) and (path in exact or _layer_is_wanted(path, config))
    ]


def short_names(modules: dict[str, nn.Module], paths: list[str], config: Any) -> list[str]:
    """Names that, as target_modules, select just ``paths``: their last components where these suffice."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    return names if set(matching(modules, names, config)) == set(paths) else sorted(paths)


def select_whole(modules: dict[str, nn.Module], config: Any, targets: Iterable[str] = ()) -> list[str]:
    """Paths of ``modules_to_save`` and of the task's head: those that end in one of the names, as in HF peft, so that "norm" also
    takes input_layernorm. What is inside another one of them is trained with it.

    ``targets``: what gets adapters from the same config. ValueError for a name that matches nothing, and where a match can't be
    trained whole: a container, one with another adapter, one in 4 bits, or one that holds a target.
    """
    given, heads = list(config.modules_to_save or ()), TASK_HEADS.get(config.task_type, ())
    for name in given:
        if name not in heads and not any(path.endswith(name) for path in modules):
            have = sorted({path.rpartition(".")[2] for path in modules})
            raise ValueError(f"modules_to_save: expected names of modules, got {name!r}; there are {', '.join(have)}")
    chosen = {path for path in modules if path.endswith((*given, *heads))}
    whole = [path for path in modules if path in chosen and not any(outer in chosen for outer in _outer(path))]
    for path in whole:
        _check_can_be_saved_whole(path, modules[path])
    for target in targets:
        if around := next((path for path in (target, *_outer(target)) if path in whole), None):
            raise ValueError(
                f"modules_to_save: {given} also selects {around}, by the end of its name, and target_modules {target}: a module "
                "is trained whole or gets adapters; give a longer part of its path"
            )
    return whole


def whole_names(config: Any, whole: list[str]) -> list[str] | None:
    """``modules_to_save`` with the task's heads that the model has; None where nothing is trained whole."""
    heads = [head for head in TASK_HEADS.get(config.task_type, ()) if any(path.endswith(head) for path in whole)]
    return sorted({*(config.modules_to_save or ()), *heads}) or None


def _outer(path: str) -> list[str]:
    """The paths of the modules around it."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _check_can_be_saved_whole(path: str, module: nn.Module) -> None:
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
        raise ValueError(f"modules_to_save: expected modules that are called, {path} is a {type(module).__name__}")
    for below, part in () if isinstance(module, ModuleToSave) else module.named_modules():
        where = f"{path}.{below}".rstrip(".")
        if isinstance(part, Wrapper):
            raise ValueError(f"modules_to_save: {path} can't be trained whole, another adapter stands on {where}")
        if isinstance(part, NF4Linear):
            raise ValueError(
                f"modules_to_save: expected dense weights, {where} is in 4 bits; quantize_model(skip=...) leaves it out"
            )


def put_in_place(model: nn.Module, wanted: dict[nn.Module, Callable[[nn.Module], Wrapper]]) -> None:
    """Wrap what is no wrapper yet, each module by its function."""
    swap_modules(model, {module: wrap(module) for module, wrap in wanted.items() if not isinstance(module, Wrapper)})


def visible_modules(model: nn.Module, is_ours: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """All modules by path, but those inside a wrapper or inside experts, which are one layer."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path and not path.startswith(inside):
            found[path] = module
            if is_ours(module) or isinstance(module, Experts):
                inside += (f"{path}.",)
    return found


def _is_linear(module: nn.Module) -> bool:
    """Of the supported modules: neither an embedding nor a convolution, with or without adapters."""
    base = getattr(module, "base_layer", module)
    return not isinstance(base, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _is_excluded(path: str, config: Any) -> bool:
    """Excluded by name, or trained whole, or part of what is; HF peft reads those names as regular expressions here."""
    if config.exclude_modules and names_match(path, config.exclude_modules):
        return True
    whole = [*(config.modules_to_save or ()), *TASK_HEADS.get(config.task_type, ())]
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in whole)


def _layer_is_wanted(path: str, config: Any) -> bool:
    """By the first numbered component of the path, after one of ``layers_pattern`` if given. Without, HF peft wants something in
    front of the list; a list at the model's top counts here where it finds no other."""
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    given = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    patterns = [rf"(?:^|.*?\.){pattern}" for pattern in given] if config.layers_pattern else [r".*?\.[^.]*", r"[^.]*"]
    for pattern in patterns:
        if found := re.match(rf"{pattern}\.(\d+)\.", path):
            return int(found.group(1)) in ([layers] if isinstance(layers, int) else layers)
    return False
