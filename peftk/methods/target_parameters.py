"""Which parameters a config's ``target_parameters`` selects, by HF peft's rules, and what adapts them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from peftk.methods.adapter import Wrapper
from peftk.methods.lora_experts import LoraExperts
from peftk.methods.lora_parameters import LoraParameters, is_matrix
from peftk.nn import Experts, is_experts
from peftk.nn.experts import PROJECTIONS


def parameters_class(module: nn.Module) -> type[LoraExperts]:
    """Fused experts run one at a time; of other modules the parameter is replaced."""
    if isinstance(module, LoraExperts):
        return type(module)
    return LoraExperts if isinstance(module, Experts) or is_experts(module) else LoraParameters


def select_parameters(modules: dict[str, nn.Module], wanted: Sequence[str], dropout: float) -> dict[str, list[str]]:
    """By path of a module the names of its selected parameters; each of ``wanted`` is a parameter's path or its last components.
    ``modules``: by path, those inside wrappers left out. ValueError where one matches nothing, or what can't be adapted."""
    found: dict[str, list[str]] = {}
    matched: set[str] = set()
    for path, module in modules.items():
        for name in _parameters(module):
            if hits := [w for w in wanted if f"{path}.{name}" == w or f"{path}.{name}".endswith(f".{w}")]:
                _check(path, name, module, dropout)
                found.setdefault(path, []).append(name)
                matched.update(hits)
    if missing := [name for name in wanted if name not in matched]:
        have = sorted({name for module in modules.values() if _has_experts(module) for name in _parameters(module)})
        raise ValueError(
            f"target_parameters: expected names of parameters, got {', '.join(map(repr, missing))}, which matches none; experts' "
            f"weights are called {', '.join(have) or 'nothing: there are none'}"
        )
    return found


def _has_experts(module: nn.Module) -> bool:
    return parameters_class(module) is LoraExperts


def _parameters(module: nn.Module) -> list[str]:
    """Of experts their weights, of other modules all their own parameters."""
    base = getattr(module, "base_layer", module)
    if isinstance(base, Experts):
        return base.projections()
    own = [name for name, parameter in base._parameters.items() if parameter is not None]
    return [name for name in PROJECTIONS if name in own] if is_experts(base) else own


def _check(path: str, name: str, module: nn.Module, dropout: float) -> None:
    if _has_experts(module):
        return
    if isinstance(module, Wrapper) and not isinstance(module, LoraParameters):
        raise ValueError(
            f"target_parameters: {path}.{name} can't be adapted, another kind of adapter stands there: detach it first"
        )
    base = module.base_layer if isinstance(module, LoraParameters) else module
    if not is_matrix(parameter := base._parameters[name]):
        raise ValueError(
            f"target_parameters: expected dense matrices or stacks of them, got {path}.{name}, {parameter.dtype} of shape "
            f"{tuple(parameter.shape)}"
        )
    if dropout:
        raise ValueError(
            f"lora_dropout: expected 0 with {path}.{name}, which is replaced whole: there is no input of a branch to drop from, "
            f"got {dropout}"
        )
