"""LoRA (Hu et al. 2021): y = W x + scale * B A dropout(x), W frozen, A (r, k) and B (n, r) trained.

scale = alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023). A is Kaiming-uniform and B zero, so that training starts at W.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftk.methods.adapter import AdapterLayer, ModuleToSave, Wrapper
from peftk.methods.lora_conv import CONVOLUTIONS, LoraConv, check_rank
from peftk.methods.lora_embedding import LoraEmbedding
from peftk.methods.lora_fields import (
    EvaConfig,
    LoftQConfig,
    are_layers,
    are_names,
    is_expression,
    is_number,
    is_pattern,
    is_rank,
    sub_config,
)
from peftk.methods.lora_init import TAKEN_FROM_W, Start, family, start_of
from peftk.methods.lora_linear import LoraLinear
from peftk.methods.lora_rules import check_config, check_layers
from peftk.methods.target_parameters import parameters_class, select_parameters
from peftk.methods.targets import (
    is_all_linear,
    pattern_value,
    put_in_place,
    select,
    select_whole,
    short_names,
    visible_modules,
    whole_names,
)
from peftk.nn import DenseConv1D, base_layer, is_adaptable
from peftk.progress import track

# Fields of HF peft's file that say nothing about what is computed, or only together with a field that is refused below.
_INFORMATIVE = {
    "peft_type", "peft_version", "auto_mapping", "revision", "runtime_config", "megatron_core", "qalora_group_size",
    "corda_config", "lora_ga_config",
}  # fmt: skip


@dataclass
class LoraConfig:
    """HF peft's field names, so that an adapter_config.json is readable both ways."""

    r: int = 8  # rank
    lora_alpha: float = 8
    lora_dropout: float = 0.0  # on the branch's input, in training
    target_modules: list[str] | str | None = None  # names, a regular expression, "all-linear"; None: q and v by architecture
    target_parameters: list[str] | None = None  # names of parameters, experts' 3-D weights for one: "experts.down_proj"
    exclude_modules: list[str] | str | None = None  # taken out of target_modules
    layers_to_transform: list[int] | int | None = None  # of numbered layers these only
    layers_pattern: list[str] | str | None = None  # what the list of layers is called; None: anything
    fan_in_fan_out: bool = False  # recorded for HF peft; a Conv1D is recognised by itself
    bias: str = "none"  # "none" | "all" | "lora_only": which biases of the base are trained
    modules_to_save: list[str] | None = None  # trained whole, beside the adapters
    # True: Kaiming A, zero B; False: B Kaiming as well; "gaussian", "orthogonal"; "eva" (then peftk.eva_init); taken out of the
    # weight, which is changed for it: "pissa", "pissa_niter_N", "olora", "loftq" (lora_init.py)
    init_lora_weights: bool | str = True
    loftq_config: LoftQConfig | dict[str, Any] | None = None
    eva_config: EvaConfig | dict[str, Any] | None = None
    use_rslora: bool = False
    use_dora: bool = False  # weight-decomposed: a magnitude a row beside the direction (dora.py)
    rank_pattern: dict[str, int] = field(default_factory=dict)  # regular expression for the end of a path -> rank
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    task_type: str | None = None  # SEQ_CLS, TOKEN_CLS and QUESTION_ANS train the model's head whole
    base_model_name_or_path: str | None = None
    inference_mode: bool = False  # the adapter is not trained

    peft_type = "LORA"

    def __post_init__(self) -> None:
        for name in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save"):
            if isinstance(value := getattr(self, name), set | tuple):
                setattr(self, name, sorted(value))
        for name, kind, start in (("loftq_config", LoftQConfig, "loftq"), ("eva_config", EvaConfig, "eva")):
            setattr(self, name, sub_config(name, getattr(self, name), kind, self.init_lora_weights == start))
        checks = {
            "r": (is_rank(self.r), "a positive integer"),
            "lora_alpha": (is_number(self.lora_alpha), "a finite number"),
            "lora_dropout": (is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1, "a probability in [0, 1)"),
            "target_modules": (are_names(self.target_modules), "names or a regular expression"),
            "exclude_modules": (are_names(self.exclude_modules), "names or a regular expression"),
            **{
                name: (are_names(value := getattr(self, name)) and not isinstance(value, str), "a list of names")
                for name in ("target_parameters", "modules_to_save")
            },
            "bias": (self.bias in ("none", "all", "lora_only"), '"none", "all" or "lora_only"'),
            "use_rslora": (isinstance(self.use_rslora, bool), "True or False"),
            "use_dora": (isinstance(self.use_dora, bool), "True or False"),
            "rank_pattern": (is_pattern(self.rank_pattern, is_rank), "regular expressions with positive ranks"),
            "alpha_pattern": (is_pattern(self.alpha_pattern, is_number), "regular expressions with finite numbers"),
            "layers_to_transform": (
                self.layers_to_transform is None
                or (are_layers(self.layers_to_transform) and not isinstance(self.target_modules, str)),
                "numbers of layers, or None where target_modules is one string (give a list of names)",
            ),
            "layers_pattern": (
                are_names(self.layers_pattern)
                and all(map(is_expression, self.layers_pattern or ()))
                and (not self.layers_pattern or self.layers_to_transform is not None),
                "names, or None where layers_to_transform is None",
            ),
            **{name: (isinstance(getattr(self, name), bool), "True or False") for name in ("fan_in_fan_out", "inference_mode")},
            **{
                name: (isinstance(getattr(self, name), str | None), "a text or None")
                for name in ("task_type", "base_model_name_or_path")
            },
        }
        for name, (fits, expected) in checks.items():
            if not fits:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        for name in ("modules_to_save", "layers_pattern"):
            value = getattr(self, name)
            for entry in [value] if isinstance(value, str) else value or ():
                if not is_expression(entry):
                    raise ValueError(f"{name}: expected names, which are read as regular expressions, got {entry!r}")
        check_config(self)

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
        start = fields.get("init_lora_weights", True)
        empty |= {k for k, owner in (("loftq_config", "loftq"), ("eva_config", "eva")) if start != owner}  # HF ignores it there
        return cls(**{k: v for k, v in fields.items() if k in known - empty})

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json holds."""
        fields = {**dataclasses.asdict(self), "peft_type": self.peft_type, "inference_mode": True}
        return {**fields, "loftq_config": fields["loftq_config"] or {}}

    def for_file(self) -> LoraConfig:
        """What a file says: an adapter that started in W is saved as a LoRA of rank 2r with the same scaling, on W itself."""
        if family(self.init_lora_weights) not in TAKEN_FROM_W:
            return self
        grown = math.sqrt(2) if self.use_rslora else 2
        return dataclasses.replace(
            self,
            r=2 * self.r,
            lora_alpha=grown * self.lora_alpha,
            rank_pattern={key: 2 * rank for key, rank in self.rank_pattern.items()},
            alpha_pattern={key: grown * alpha for key, alpha in self.alpha_pattern.items()},
            init_lora_weights=True,
            loftq_config=None,
        )

    def targets(self, model: nn.Module) -> list[str]:
        """Paths of the modules that this config selects, without target_parameters', beside which None means none, as in HF peft.
        ValueError where nothing is selected, or what can't be adapted."""
        if self.target_parameters and not self.target_modules:
            return []
        return select(model, self, _is_supported, _is_wrapper)

    def inject(self, model: nn.Module, name: str) -> LoraConfig:
        """Put adapters called ``name`` on the modules that this config selects, all or, on a ValueError, none. Returns a copy
        that names what was selected."""
        modules = visible_modules(model, _is_wrapper)
        stacked = select_parameters(modules, self.target_parameters or (), self.lora_dropout)
        paths = self.targets(model)
        if both := [path for path in paths if path in stacked]:
            raise ValueError(f"target_parameters: {both[0]} is adapted whole by target_modules already: leave it out of one")
        whole = select_whole(modules, self, (*paths, *stacked))
        kinds = {path: layer_class(modules[path]) for path in paths} | {p: parameters_class(modules[p]) for p in stacked}
        check_layers(self, model, {path: (modules[path], kind) for path, kind in kinds.items()})
        sizes = {path: self._rank_and_scaling(path) for path in paths}
        for path, (rank, _) in sizes.items():
            check_rank(path, modules[path], rank, self)
        starts = self._starts({path: modules[path] for path in paths}, sizes)
        put_in_place(model, {modules[p]: kind for p, kind in kinds.items()} | {modules[p]: ModuleToSave for p in whole})
        for path in paths:
            layer = model.get_submodule(path)
            layer.add_adapter(name, *sizes[path], self)
            if path in starts:
                layer.take_start(name, starts.pop(path))
        for path, parameters in stacked.items():
            for parameter in parameters:
                model.get_submodule(path).add_adapter(name, parameter, *self._rank_and_scaling(f"{path}.{parameter}"), self)
        for path in whole:
            model.get_submodule(path).add_adapter(name)
        return self._resolved(model, modules, paths, whole)

    def ranks(self, model: nn.Module) -> dict[str, int]:
        """What ``inject`` would give to each layer and parameter, by path. ValueError as there."""
        modules = visible_modules(model, _is_wrapper)
        stacked = select_parameters(modules, self.target_parameters or (), self.lora_dropout)
        paths = [*self.targets(model), *(f"{path}.{parameter}" for path, names in stacked.items() for parameter in names)]
        return {path: self._rank_and_scaling(path)[0] for path in paths}

    def _rank_and_scaling(self, path: str) -> tuple[int, float]:
        rank = pattern_value(self.rank_pattern, path, self.r)
        alpha = pattern_value(self.alpha_pattern, path, self.lora_alpha)
        return rank, self.scaling_of(rank, alpha)

    def scaling_of(self, rank: int, alpha: float) -> float:
        """What B A is multiplied by."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _starts(self, modules: dict[str, nn.Module], sizes: dict[str, tuple[int, float]]) -> dict[str, Start]:
        """What is taken out of the layers' weights, by path; nothing is changed yet, so that an error leaves all as it was."""
        if family(self.init_lora_weights) not in TAKEN_FROM_W:
            return {}
        work = track(list(modules.items()), f"{self.init_lora_weights}: decomposing weights", len(modules) > 1)
        return {path: start_of(path, _weight_of(module), *sizes[path], self) for path, module in work}

    def _resolved(self, model: nn.Module, modules: dict[str, nn.Module], paths: list[str], whole: list[str]) -> LoraConfig:
        """Another program may read "all-linear" or None in another way: the copy says names."""
        config = copy.deepcopy(self)
        if self.target_modules is None or is_all_linear(self.target_modules):
            config.target_modules = short_names(modules, paths, self)
        config.modules_to_save = whole_names(config, whole)
        config.fan_in_fan_out = bool(paths) and all(
            isinstance(model.get_submodule(path).base_layer, DenseConv1D) for path in paths
        )
        return config


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(module, Wrapper)


def _is_supported(module: nn.Module) -> bool:
    """A linear layer, an embedding, a convolution, or one with LoRA. Other subclasses of nn.Embedding may look rows up in their
    own way."""
    if isinstance(module, nn.Embedding):
        return type(module) is nn.Embedding or hasattr(module, "embed_scale")
    return isinstance(module, LoraLinear | LoraEmbedding | LoraConv) or is_adaptable(module) or type(module) in CONVOLUTIONS


def layer_class(module: nn.Module) -> type[AdapterLayer]:
    """The LoRA layer for a linear layer, an embedding or a convolution; of one that has LoRA already its own class."""
    if isinstance(module, AdapterLayer):
        return type(module)
    if isinstance(module, nn.Embedding):
        return LoraEmbedding
    return LoraConv if type(module) in CONVOLUTIONS else LoraLinear


def _weight_of(module: nn.Module) -> torch.Tensor:
    """W (n, k) of a linear layer, plain or with adapters."""
    return module.read_weight() if isinstance(module, AdapterLayer) else base_layer(module).dense_weight()
