"""A model without its weights: which of its layers go into 4 bits, and under which names a checkpoint has them.

transformers builds it from the config, on the meta device; so a layer that it keeps in fp32 or ties to another is known for any
architecture.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from peftk.nn import is_experts
from peftk.nn.dense_linear import is_conv1d
from peftk.nn.experts import has_other_experts
from peftk.nn.quantize_model import quantizable


def skeleton(config: Any) -> nn.Module:
    """The class that the config names, else a causal language model. ValueError for one that transformers doesn't have."""
    transformers = import_module("transformers")
    names = getattr(config, "architectures", None) or []
    found = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    try:
        with torch.device("meta"):
            return (found[0]._from_config if found else transformers.AutoModelForCausalLM.from_config)(config)
    except ValueError as error:
        told = str(error).splitlines()[0]
        raise ValueError(f"expected an architecture that transformers has, got {names or config.model_type}: {told}") from error


@dataclass(frozen=True)
class Names:
    """From a file's names to the model's: the same, or with or without the base model's prefix."""

    known: frozenset[str]
    prefix: str

    @classmethod
    def of(cls, model: nn.Module) -> Names:
        """Those of parameters and buffers."""
        tensors = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        known = frozenset(name for named in tensors for name, _ in named)
        return cls(known, getattr(model, "base_model_prefix", "") or "")

    def of_model(self, name: str) -> str:
        """``name`` itself where the model has no such tensor: transformers renames or joins some as it reads them."""
        start = f"{self.prefix}."
        for candidate in (name, start + name, name.removeprefix(start)):
            if candidate in self.known:
                return candidate
        return name


def linears(model: nn.Module) -> dict[str, bool]:
    """By path of each linear layer whether its weight is stored as (k, n), as Conv1D's is."""
    return {path: is_conv1d(module) for path, module in model.named_modules() if type(module) is nn.Linear or is_conv1d(module)}


def layers_to_quantise(model: nn.Module, skip: Sequence[str], stored: Iterable[str]) -> list[str]:
    """Paths of the layers that go into 4 bits: all linear ones of which ``stored``, the names of the checkpoint's tensors as the
    model has them, holds the weight, but the output head, ``skip``, and experts, which bitsandbytes' form has no keys for."""
    stored, head = set(stored), _output_head(model)
    kept = [path for path, module in model.named_modules() if module is head]
    kept += [path for path, module in model.named_modules() if is_experts(module) or has_other_experts(module)]
    found = quantizable(model, skip=[*kept, *skip])
    wanted = [path for path in linears(model) if path in found and f"{path}.weight" in stored]
    dense = [path for path in linears(model) if path not in wanted]
    return [path for path in wanted if not _hidden_by(path, dense)]


def _output_head(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def dense_layers(model: nn.Module, quantised: Iterable[str]) -> list[str]:
    """Paths of the other linear layers and of fused experts, as config.json lists them for transformers."""
    quantised, linear = set(quantised), linears(model)
    experts = {path for path, module in model.named_modules() if is_experts(module) or has_other_experts(module)}
    return [path for path, _ in model.named_modules() if path in experts or (path in linear and path not in quantised)]


def _hidden_by(path: str, dense: Iterable[str]) -> bool:
    """Whether transformers would take a layer for a dense one by its name: it matches beginnings and ends of paths."""
    return any(re.match(rf"{re.escape(name)}(\.|$)", path) or path.endswith(name) for name in dense)


def tied(model: nn.Module) -> dict[str, list[str]]:
    """By name of a parameter that stands at several places all its names."""
    places: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places[id(parameter)].append(name)
    return {name: names for names in places.values() if len(names) > 1 for name in names}
