"""AdaLoRA (Zhang et al. 2023): the change of a weight in the form of a singular value decomposition, and a budget of singular
values that training spends where they matter.

``adalora_layer.py`` is what layers share, ``rank_allocator.py`` decides which triplets stay, ``adalora_schedule.py`` lets it do
so from an optimizer's hook, ``compaction.py`` removes the others, ``orthogonality.py`` keeps the vectors apart.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from peftk.methods.adalora_conv import AdaLoraConv
from peftk.methods.adalora_layer import AdaLoraLayer
from peftk.methods.adalora_linear import AdaLoraLinear
from peftk.methods.adapter import ModuleToSave, Wrapper
from peftk.methods.attach import attached, known
from peftk.methods.lora import LoraConfig
from peftk.methods.lora_conv import CONVOLUTIONS
from peftk.methods.lora_fields import is_number, is_pattern, is_rank
from peftk.methods.targets import ALL_LINEAR, put_in_place, select, select_whole, visible_modules
from peftk.nn import is_adaptable

logger = logging.getLogger("peftk")

# LoRA's fields that mean the same here; HF peft's AdaLoRA ignores the others.
_SHARED = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "fan_in_fan_out", "bias", "modules_to_save", "init_lora_weights", "rank_pattern", "task_type", "base_model_name_or_path",
    "inference_mode",
}  # fmt: skip


@dataclass
class AdaLoraConfig(LoraConfig):
    """HF peft's field names, so that an adapter_config.json is readable both ways. A step is one of the optimizer's.

    Up to step ``tinit`` every matrix has ``init_r`` triplets; then the budget falls, by a cubic curve, to ``target_r`` a matrix
    on average at step ``total_step - tfinal``; from there on the ranks stay. The scale is ``lora_alpha / init_r``. ``r`` is
    not used.
    """

    target_modules: list[str] | str | None = ALL_LINEAR  # the paper's choice (section 4); None: q and v by architecture
    target_r: int = 8  # average rank at the end
    init_r: int = 12  # rank at the start
    tinit: int = 0  # steps before the first pruning
    tfinal: int = 0  # steps after the last one
    deltaT: int = 1  # steps between two
    beta1: float = 0.85  # of the moving average of the sensitivity
    beta2: float = 0.85  # of the moving average of its uncertainty
    orth_reg_weight: float = 0.5  # of the mean distance of P^T P and Q Q^T from I
    total_step: int | None = None  # must be given
    rank_pattern: dict[str, list[bool]] | None = field(default=None)  # "<path>.lora_E" -> which of init_r triplets are left

    peft_type = "ADALORA"

    def __post_init__(self) -> None:
        pattern, self.rank_pattern = self.rank_pattern or None, {}
        super().__post_init__()
        self.rank_pattern = pattern
        for name, (fits, expected) in self._checks().items():
            if not fits:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        self._refuse_other_fields()
        if self.r != LoraConfig.r:
            logger.warning("r: AdaLoRA doesn't use it, got %d; its ranks are init_r and target_r", self.r)

    def _checks(self) -> dict[str, tuple[bool, str]]:
        end = self.total_step - self.tfinal if is_rank(self.total_step) and _is_count(self.tfinal) else 0
        return {
            "init_r": (is_rank(self.init_r), "a positive integer"),
            "target_r": (
                is_rank(self.target_r) and self.target_r <= self.init_r,
                f"a positive integer of at most init_r ({self.init_r})",
            ),
            "total_step": (is_rank(self.total_step), "a positive integer, the optimizer steps of the whole training"),
            "tfinal": (_is_count(self.tfinal), "an integer of at least 0"),
            "tinit": (
                _is_count(self.tinit) and self.tinit < end,
                f"an integer from 0 to below total_step - tfinal ({end}), so that there is a phase in which ranks fall",
            ),
            "deltaT": (is_rank(self.deltaT), "a positive integer"),
            "beta1": (_is_between(self.beta1), "a number between 0 and 1"),
            "beta2": (_is_between(self.beta2), "a number between 0 and 1"),
            "orth_reg_weight": (is_number(self.orth_reg_weight) and self.orth_reg_weight >= 0, "a number of at least 0"),
            "init_lora_weights": (self.init_lora_weights in (True, False), "True or False"),
            "rank_pattern": (
                self.rank_pattern is None or is_pattern(self.rank_pattern, self._is_row_of_flags),
                f"paths with lists of init_r ({self.init_r}) booleans",
            ),
        }

    def _is_row_of_flags(self, flags: Any) -> bool:
        return isinstance(flags, list) and len(flags) == self.init_r and all(isinstance(flag, bool) for flag in flags)

    def _refuse_other_fields(self) -> None:
        plain = LoraConfig()
        for f in dataclasses.fields(LoraConfig):
            value, default = getattr(self, f.name), getattr(plain, f.name)
            if f.name not in _SHARED and value != default:
                raise ValueError(f"{f.name}: expected {default!r}, which AdaLoRA has no other meaning for, got {value!r}")

    def targets(self, model: nn.Module) -> list[str]:
        return select(model, self, _is_supported, _is_wrapper, "linear layers or convolutions")

    def ranks(self, model: nn.Module) -> dict[str, int]:
        return self._ranks(self.targets(model))

    def inject(self, model: nn.Module, name: str) -> AdaLoraConfig:
        """Put adapters called ``name`` on the modules that this config selects, all or, on a ValueError, none. Returns a copy
        that names what was selected."""
        modules = visible_modules(model, _is_wrapper)
        paths = self.targets(model)
        whole = select_whole(modules, self, paths)
        ranks = self._ranks(paths)
        _check_groups({path: modules[path] for path in paths})
        put_in_place(model, {modules[p]: _wrap for p in paths} | {modules[p]: ModuleToSave for p in whole})
        for path in paths:
            model.get_submodule(path).add_adapter(name, ranks[path], self)
        for path in whole:
            model.get_submodule(path).add_adapter(name)
        return self._resolved(model, modules, paths, whole)

    def _ranks(self, paths: list[str]) -> dict[str, int]:
        """Rows of each matrix. ValueError for a pattern of a module that isn't selected."""
        pattern = {key.removesuffix(".lora_E"): sum(flags) for key, flags in (self.rank_pattern or {}).items()}
        if unknown := sorted(set(pattern) - set(paths)):
            raise ValueError(f"rank_pattern: expected paths of modules that target_modules selects, got {', '.join(unknown)}")
        return {path: pattern.get(path, self.init_r) for path in paths}


def config_of(model: nn.Module, adapter_name: str) -> AdaLoraConfig:
    """The config of an attached adapter. ValueError where there is none of this name, or another method's."""
    state = attached(model)
    config = state.configs[known(state, adapter_name, "adapter_name")[0]]
    if not isinstance(config, AdaLoraConfig):
        raise ValueError(f"adapter_name: expected an AdaLoRA adapter, got {adapter_name!r}, a {config.peft_type}")
    return config


def names_in(model: nn.Module) -> list[str]:
    """All AdaLoRA adapters of a model. ValueError where there are none."""
    configs = attached(model).configs
    names = [name for name, config in configs.items() if isinstance(config, AdaLoraConfig)]
    if not names:
        raise ValueError(f"model: expected one with AdaLoRA adapters, got one with {', '.join(configs)}")
    return names


def _is_count(value: Any) -> bool:
    return value == 0 or is_rank(value)


def _is_between(value: Any) -> bool:
    return is_number(value) and 0 < value < 1


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(module, Wrapper)


def _is_supported(module: nn.Module) -> bool:
    return isinstance(module, AdaLoraLayer) or is_adaptable(module) or type(module) in CONVOLUTIONS


def _wrap(module: nn.Module) -> AdaLoraLayer:
    return AdaLoraConv(module) if type(module) in CONVOLUTIONS else AdaLoraLinear(module)


def _check_groups(modules: dict[str, nn.Module]) -> None:
    for path, module in modules.items():
        if (groups := getattr(module, "groups", 1)) != 1:
            raise ValueError(
                f"target_modules: {path} is a convolution with groups={groups}, and what AdaLoRA adds goes across groups; "
                "exclude_modules leaves it out"
            )
