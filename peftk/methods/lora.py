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

import torch
from torch import nn
from torch.nn import functional

from peftk.methods.adapter import AdapterLayer, ModuleToSave, Wrapper
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
from peftk.nn import DenseConv1D, base_layer, is_adaptable
from peftk.nn.dense_linear import add_low_rank

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


def _keep_off_fast_path(module: nn.Module, arguments: Any) -> None:
    """nn.TransformerEncoderLayer's fast path reads the weights itself, without adapters; it keeps off where a hook is found."""


class LoraLinear(AdapterLayer):
    """A linear base layer, dense or in 4 bits, with low-rank branches: x (..., k) -> (..., n), in the base layer's dtype."""

    def __init__(self, module: nn.Module):
        super().__init__(base_layer(module), module)
        if self.base_layer is not module:
            self.base_layer.register_forward_pre_hook(_keep_off_fast_path)
        self.in_features, self.out_features = self.base_layer.in_features, self.base_layer.out_features
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()  # (r, k) and (n, r)
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}

    def adapter_names(self) -> list[str]:
        return list(self.lora_A)

    def add_adapter(self, name: str, r: int, scaling: float, config: LoraConfig) -> None:
        """Fresh factors: A Kaiming-uniform (a = sqrt 5) or Gaussian, B zero."""
        facts = {"device": self.weight.device, "dtype": self.factor_dtype()}
        A, B = torch.zeros(r, self.in_features, **facts), torch.zeros(self.out_features, r, **facts)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if config.init_lora_weights is False:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))
        self.lora_A[name], self.lora_B[name] = nn.Parameter(A), nn.Parameter(B)
        self.scaling[name], self.dropout[name] = scaling, config.lora_dropout

    def delete_adapter(self, name: str) -> None:
        for table in (self.lora_A, self.lora_B, self.scaling, self.dropout):
            del table[name]

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return [self.lora_A[name], self.lora_B[name]]

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        return {"lora_A.weight": self.lora_A[name], "lora_B.weight": self.lora_B[name]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows is not None:
            return self._forward_rows(x)
        names = self.running()
        if not names:
            return self.base_layer.forward(x)
        first, *others = ((self.lora_A[n], self.lora_B[n], self.scaling[n], self._dropout(n)) for n in names)
        y = self.base_layer.forward_low_rank(x, *first[:3], dropout=first[3])
        for A, B, scale, dropout in others:
            y = add_low_rank(y, x, A, B, scale, None, dropout, None)
        return y

    def _forward_rows(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer.forward(x)
        for names, rows in self.rows_of(x.shape[0], x.device).items():
            for n in names:
                factors = self.lora_A[n], self.lora_B[n], self.scaling[n]
                y = y.index_copy(0, rows, add_low_rank(y[rows], x[rows], *factors, None, self._dropout(n), None))
        return y

    def _dropout(self, name: str) -> float:
        return self.dropout[name] if self.training else 0.0

    @torch.no_grad()
    def delta_weight(self, name: str) -> torch.Tensor:
        return (self.lora_B[name] @ self.lora_A[name]).mul_(self.scaling[name])


class LoraEmbedding(AdapterLayer):
    """An embedding with low-rank branches: rows of A^T, then B. A (r, tokens) is zero at first and B (d, r) Gaussian.

    ids (...) -> (..., d). Dropout does not apply to token ids.
    """

    def __init__(self, module: nn.Embedding):
        super().__init__(module, module)
        self.num_embeddings, self.embedding_dim, self.padding_idx = (
            module.num_embeddings,
            module.embedding_dim,
            module.padding_idx,
        )
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}

    def adapter_names(self) -> list[str]:
        return list(self.lora_embedding_A)

    def add_adapter(self, name: str, r: int, scaling: float, config: LoraConfig) -> None:
        """Fresh factors: A zero, or Gaussian where ``init_lora_weights`` is False; B Gaussian."""
        facts = {"device": self.weight.device, "dtype": self.factor_dtype()}
        make = torch.randn if config.init_lora_weights is False else torch.zeros
        self.lora_embedding_A[name] = nn.Parameter(make(r, self.num_embeddings, **facts))
        self.lora_embedding_B[name] = nn.Parameter(torch.randn(self.embedding_dim, r, **facts))
        self.scaling[name] = scaling

    def delete_adapter(self, name: str) -> None:
        for table in (self.lora_embedding_A, self.lora_embedding_B, self.scaling):
            del table[name]

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return [self.lora_embedding_A[name], self.lora_embedding_B[name]]

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        return {"lora_embedding_A": self.lora_embedding_A[name], "lora_embedding_B": self.lora_embedding_B[name]}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = self.base_layer.forward(ids)
        if self.rows is None:
            for name in self.running():
                y = y + self._branch(name, ids, y.dtype)
            return y
        for names, rows in self.rows_of(ids.shape[0], ids.device).items():
            for name in names:
                y = y.index_add(0, rows, self._branch(name, ids[rows], y.dtype))
        return y

    def _branch(self, name: str, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rows = functional.embedding(ids, self.lora_embedding_A[name].T, self.padding_idx)
        scale = getattr(self.base_layer, "embed_scale", 1.0)  # transformers' scaled embeddings multiply their rows by it
        return (self.scaling[name] * scale * functional.linear(rows, self.lora_embedding_B[name])).to(dtype)

    @torch.no_grad()
    def delta_weight(self, name: str) -> torch.Tensor:
        """(tokens, d)"""
        return (self.lora_embedding_A[name].T @ self.lora_embedding_B[name].T).mul_(self.scaling[name])

    def read_weight(self) -> torch.Tensor:
        return self.weight.detach()

    @torch.no_grad()
    def write_weight(self, w: torch.Tensor) -> None:
        self.weight.copy_(w)

    def take_snapshot(self) -> torch.Tensor:
        return self.weight.detach().clone()

    def restore_snapshot(self, snapshot: torch.Tensor) -> None:
        self.write_weight(snapshot)
