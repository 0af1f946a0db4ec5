"""Which of LoRA's variants go together, and on what; every refusal says why.

What isn't named here combines: rsLoRA, DoRA, dropout, patterns of ranks, several adapters, rows, any start, dense and NF4 bases.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from torch import nn

from peftk.methods.lora_init import DRAWN, TAKEN_FROM_W, family, niter
from peftk.nn import NF4Linear

if TYPE_CHECKING:
    from peftk.methods.adapter import AdapterLayer
    from peftk.methods.lora import LoraConfig


def check_config(config: LoraConfig) -> None:
    """ValueError where fields contradict one another."""
    kind = config.init_lora_weights
    if family(kind) not in (*DRAWN, *TAKEN_FROM_W):
        names = ", ".join(repr(name) for name in (*DRAWN, *TAKEN_FROM_W))
        raise ValueError(f'init_lora_weights: expected {names} or "pissa_niter_N", got {kind!r}')
    for field, owner in (("loftq_config", "loftq"), ("eva_config", "eva")):
        if getattr(config, field) is not None and kind != owner:
            raise ValueError(f'{field}: expected None unless init_lora_weights is "{owner}", got it with {kind!r}')
    if kind == "orthogonal" and (odd := [r for r in (config.r, *config.rank_pattern.values()) if r % 2]):
        raise ValueError(f'r: expected even ranks for "orthogonal", which halves an orthogonal matrix, got {odd[0]}')


def variants_of(config: LoraConfig) -> list[str]:
    """What the config asks of a layer beyond the LoRA that every class of layers has."""
    kind = family(config.init_lora_weights)
    return [*(["use_dora"] if config.use_dora else []), *([] if kind in (True, False, "gaussian") else [kind])]


def check_layers(config: LoraConfig, model: nn.Module, layers: dict[str, tuple[nn.Module, type[AdapterLayer]]]) -> None:
    """ValueError, before anything is changed, where a layer can't have what the config asks. ``layers``: by path what stands
    there now, plain or with adapters, and the class that adapts it."""
    variants = variants_of(config)
    takes = family(config.init_lora_weights) in TAKEN_FROM_W
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for path, (module, kind) in layers.items() if variants else ():
        if missing := [variant for variant in variants if variant not in getattr(kind, "VARIANTS", ())]:
            raise ValueError(f"{path}: {missing[0]} is not defined for a {_name(module)}; exclude_modules leaves it out")
        if config.use_dora and (groups := getattr(_base(module), "groups", 1)) > 1:
            raise ValueError(f"{path}: use_dora needs W + s B A as one matrix, which a convolution with groups={groups} hasn't")
        if (merged := getattr(module, "merged", None)) and (takes or config.use_dora):
            raise ValueError(
                f"{path}: {variants[0]} needs the weight as it is without adapters, and {', '.join(merged)} is merged into it; "
                "unmerge first"
            )
        if takes:
            _check_taking(config, path, module, owners)


def _check_taking(config: LoraConfig, path: str, module: nn.Module, owners: Counter[int]) -> None:
    kind, base = config.init_lora_weights, _base(module)
    if getattr(module, "taken", None) is not None:
        raise ValueError(
            f"{path}: {kind} takes its start out of the stored weight, as {module.taken.owner!r} did already: give the "
            "second adapter another start"
        )
    if owners[id(base.weight)] > 1:
        raise ValueError(
            f"{path}: {kind} changes the stored weight, which is tied to another module's; exclude_modules leaves it out"
        )
    if base.weight.is_meta:
        raise ValueError(f"{path}: {kind} needs the weight's values, and it is on the meta device")
    if kind == "loftq" and isinstance(base, NF4Linear):
        raise ValueError(
            f"{path}: loftq fits the adapter to what quantisation loses, and the weight is in 4 bits already: attach it to dense "
            'layers, which it quantises itself; peftk.qlora does so. "pissa" works on 4 bits'
        )


def check_file(config: LoraConfig, model: nn.Module) -> None:
    """ValueError for an adapter_config.json whose start can't be made again: its tensors would be added to another weight than
    the one they were trained on."""
    kind = config.init_lora_weights
    reason = ""
    if niter(kind) is not None:
        reason = "a randomised decomposition of the weight, which no second run finds again"
    elif kind == "loftq":
        reason = "another program's quantisation, which the file doesn't hold"
    elif family(kind) in TAKEN_FROM_W and any(isinstance(module, NF4Linear) for module in model.modules()):
        reason = "a decomposition of the dense weight, and this model's is in 4 bits"
    if reason:
        raise ValueError(
            f"init_lora_weights: expected an adapter that stands on the original weight, got {kind!r}: its start was {reason}. "
            "Save it as a difference instead (peftk does; HF peft with path_initial_model_for_weight_conversion)"
        )


def _base(module: nn.Module) -> nn.Module:
    return getattr(module, "base_layer", module)


def _name(module: nn.Module) -> str:
    return type(_base(module)).__name__
