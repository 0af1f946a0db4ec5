"""Which 3-D weights of fused experts a config's ``target_parameters`` selects, by HF peft's rules."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from peftk.methods.lora_experts import LoraExperts
from peftk.nn import Experts, is_experts


def select_parameters(modules: dict[str, nn.Module], wanted: Sequence[str]) -> dict[str, list[str]]:
    """By path of the experts the names of the selected weights; each of ``wanted`` is a weight's path or its last components.
    ``modules``: by path, those inside wrappers left out. ValueError where one matches nothing, or what can't be adapted."""
    found: dict[str, list[str]] = {}
    matched: set[str] = set()
    for path, module in modules.items():
        for name in _weights(module):
            if hits := [w for w in wanted if f"{path}.{name}" == w or f"{path}.{name}".endswith(f".{w}")]:
                _check(path, name, module)
                found.setdefault(path, []).append(name)
                matched.update(hits)
    if missing := [name for name in wanted if name not in matched]:
        have = sorted({name for module in modules.values() if _served(module) for name in _weights(module)})
        raise ValueError(
            f"target_parameters: expected names of experts' weights, got {', '.join(map(repr, missing))}, which matches none; "
            f"there are {', '.join(have) or 'none'}"
        )
    return found


def _served(module: nn.Module) -> bool:
    return isinstance(module, LoraExperts | Experts) or is_experts(module)


def _weights(module: nn.Module) -> list[str]:
    """Of experts their weights, of other modules all their own parameters."""
    base = module.base_layer if isinstance(module, LoraExperts) else module
    if isinstance(base, Experts):
        return base.projections()
    own = [name for name, parameter in base._parameters.items() if parameter is not None]
    return [name for name in own if not name.endswith("_bias")] if is_experts(base) else own


def _check(path: str, name: str, module: nn.Module) -> None:
    if not _served(module):
        raise ValueError(
            f"target_parameters: expected weights of fused experts by transformers' protocol, got {path}.{name} of a "
            f"{type(module).__name__}; target_modules takes linear layers, embeddings and convolutions"
        )
