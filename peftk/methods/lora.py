"""LoRA (Hu et al. 2021): y = W x + scale * B A dropout(x), W frozen, A (r, k) and B (n, r) trained.

scale = alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023). A is Kaiming-uniform and B zero, so that training starts at W.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from peftk.methods.adapter import AdapterLayer, ModuleToSave, Wrapper
from peftk.methods.lora_embedding import LoraEmbedding
from peftk.methods.lora_linear import LoraLinear
from peftk.methods.targets import (
    ALL_LINEAR,
    check_can_be_saved_whole,
    pattern_value,
    put_in_place,
    select,
    select_whole,
    short_names,
    visible_modules,
)
from peftk.nn import DenseConv1D, is_adaptable

# Fields of HF peft's file that say nothing about what is computed, or only together with a field that is refused below.
_INFORMATIVE = {
    "peft_type", "peft_version", "auto_mapping", "revision", "runtime_config", "megatron_core", "qalora_group_size",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip


@dataclass
class LoraConfig:
    """HF peft's field names, so that an adapter_config.json is readable both ways."""

    r: int = 8  # rank
    lora_alpha: float = 8
    lora_dropout: float = 0.0  # on the branch's input, in training
    target_modules: list[str] | str | None = None  # names, a regular expression, "all-linear"; None: q and v by architecture
    exclude_modules: list[str] | str | None = None  # taken out of target_modules
    layers_to_transform: list[int] | int | None = None  # of numbered layers these only
    layers_pattern: list[str] | str | None = None  # what the list of layers is called; None: anything
    fan_in_fan_out: bool = False  # recorded for HF peft; a Conv1D is recognised by itself
    bias: str = "none"  # "none" | "all" | "lora_only": which biases of the base are trained
    modules_to_save: list[str] | None = None  # trained whole, beside the adapters
    init_lora_weights: bool | str = True  # True: Kaiming A, zero B; "gaussian": N(0, 1/r) A, zero B; False: B Kaiming as well
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)  # regular expression for the end of a path -> rank
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    task_type: str | None = None  # SEQ_CLS, TOKEN_CLS and QUESTION_ANS train the model's head whole
    base_model_name_or_path: str | None = None
    inference_mode: bool = False  # the adapter is not trained

    peft_type = "LORA"

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(value := getattr(self, name), set | tuple):
                setattr(self, name, sorted(value))
        checks = {
            "r": (_is_rank(self.r), "a positive integer"),
            "lora_alpha": (_is_number(self.lora_alpha), "a finite number"),
            "lora_dropout": (_is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1, "a probability in [0, 1)"),
            "target_modules": (_are_names(self.target_modules), "names or a regular expression"),
            "exclude_modules": (_are_names(self.exclude_modules), "names or a regular expression"),
            "modules_to_save": (
                _are_names(self.modules_to_save) and not isinstance(self.modules_to_save, str),
                "a list of names",
            ),
            "bias": (self.bias in ("none", "all", "lora_only"), '"none", "all" or "lora_only"'),
            "init_lora_weights": (self.init_lora_weights in (True, False, "gaussian"), 'True, False or "gaussian"'),
            "rank_pattern": (_is_pattern(self.rank_pattern, _is_rank), "regular expressions with positive ranks"),
            "alpha_pattern": (_is_pattern(self.alpha_pattern, _is_number), "regular expressions with finite numbers"),
            "layers_to_transform": (
                self.layers_to_transform is None or not isinstance(self.target_modules, str),
                "None where target_modules is one string (give a list of names)",
            ),
            "layers_pattern": (
                not self.layers_pattern or self.layers_to_transform is not None,
                "None where layers_to_transform is None",
            ),
        }
        for name, (fits, expected) in checks.items():
            if not fits:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LoraConfig:
        """From an adapter_config.json. A field that asks for what is not done here is refused, never ignored."""
        known = {f.name for f in dataclasses.fields(cls)}
        asked = {k: v for k, v in fields.items() if k not in known | _INFORMATIVE and v not in (None, False, [], {}, "")}
        if asked:
            raise ValueError(
                f"expected a LoRA without {', '.join(f'{k}={v!r}' for k, v in asked.items())}: peftk doesn't do that"
            )
        empty = {k for k in ("rank_pattern", "alpha_pattern", "layers_pattern") if not fields.get(k)}
        return cls(**{k: v for k, v in fields.items() if k in known - empty})

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json holds."""
        return {**dataclasses.asdict(self), "peft_type": self.peft_type, "inference_mode": True}

    def inject(self, model: nn.Module, name: str) -> LoraConfig:
        """Put adapters called ``name`` on the modules that this config selects, all or, on a ValueError, none. Returns a copy
        that names what was selected."""
        modules = visible_modules(model, _is_wrapper)
        paths = select(model, self, _is_supported, _is_wrapper)
        whole = select_whole(modules, self)
        for path in whole:
            check_can_be_saved_whole(path, modules[path])
        put_in_place(model, {modules[p]: wrap for p in paths} | {modules[p]: ModuleToSave for p in whole})
        for path in paths:
            rank = pattern_value(self.rank_pattern, path, self.r)
            alpha = pattern_value(self.alpha_pattern, path, self.lora_alpha)
            scaling = alpha / (math.sqrt(rank) if self.use_rslora else rank)
            model.get_submodule(path).add_adapter(name, rank, scaling, self)
        for path in whole:
            model.get_submodule(path).add_adapter(name)
        return self._resolved(model, modules, paths, whole)

    def _resolved(self, model: nn.Module, modules: dict[str, nn.Module], paths: list[str], whole: list[str]) -> LoraConfig:
        """Another program may read "all-linear" or None in another way: the copy says names."""
        config = copy.deepcopy(self)
        if self.target_modules is None or self.target_modules == ALL_LINEAR:
            config.target_modules = short_names(modules, paths, self)
        if whole:
            config.modules_to_save = sorted({*(self.modules_to_save or ()), *(path.rpartition(".")[2] for path in whole)})
        config.fan_in_fan_out = all(isinstance(model.get_submodule(path).base_layer, DenseConv1D) for path in paths)
        return config


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_expression(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _are_names(value: Any) -> bool:
    if value is None or isinstance(value, str):
        return value is None or _is_expression(value)
    return isinstance(value, list | tuple | set) and all(isinstance(name, str) for name in value)


def _is_pattern(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(_is_expression(key) and is_right(v) for key, v in value.items())


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(module, Wrapper)


def _is_supported(module: nn.Module) -> bool:
    """A linear layer, an embedding, or one with LoRA. Other subclasses of nn.Embedding may look rows up in their own way."""
    is_scaled = isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")
    return isinstance(module, LoraLinear | LoraEmbedding) or is_adaptable(module) or type(module) is nn.Embedding or is_scaled


def wrap(module: nn.Module) -> AdapterLayer:
    """The LoRA layer for a linear layer or an embedding."""
    return LoraEmbedding(module) if isinstance(module, nn.Embedding) else LoraLinear(module)
