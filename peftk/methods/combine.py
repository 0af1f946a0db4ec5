"""A weighted combination of LoRA adapters as a new adapter."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from peftk.methods.adapter import AdapterLayer, ModuleToSave, Wrapper
from peftk.methods.attach import Attached, attach, attached, check_new_name, known, wrappers
from peftk.methods.lora import LoraConfig
from peftk.methods.low_rank import Matrices, low_rank_of, truncate
from peftk.methods.targets import matching, short_names, visible_modules
from peftk.methods.task_arithmetic import MAJORITY, METHODS, weighted_sum
from peftk.ops.philox_dropout import draw_seed

ALL_METHODS = ("cat", *METHODS, "svd", *(f"{method}_svd" for method in METHODS if method != "linear"))


@torch.no_grad()
def combine_adapters(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    new_name: str,
    method: str = "cat",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int | None = None,
) -> nn.Module:
    """Attach ``new_name``, made of the LoRA adapters ``names`` with one weight each, and make it the active one. Returns the
    model. With s an adapter's scale and w its weight, a layer gets, with scale 1 and only from the adapters it has:

    "cat": sum w s B A exactly, with the sum of the ranks.
    "svd": the nearest to that sum of rank ``rank`` (the largest of the ranks if None), without the sum itself in memory.
    "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune": the A's by themselves with sign(w s) sqrt|w s|, the B's
    with sqrt|w s|, as HF peft does: its cross terms B_i A_j are no part of the sum, so these are rough. Of one rank only.
    "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd": on the matrices s B A, one in memory at a time, then
    the nearest of rank ``rank``.

    ``density``: the share of elements that all but "cat", "linear" and "svd" keep; ``majority_sign_method``: "total" or
    "frequency"; ``seed``: of DARE's masks, drawn from torch's generator if None. The new config's rank_pattern says each
    layer's own rank. ValueError names the argument that doesn't fit, and the layer where ranks differ; the model is then as
    before.
    """
    state = attached(model)
    check_new_name(model, new_name)
    _check(names, weights, method, rank, density, majority_sign_method)
    known(state, names, "names")
    _check_adapters(model, state, names)
    recipe = _Recipe(method, rank, density, majority_sign_method, _generator(seed))
    made: dict[str, Matrices] = {}
    for path, layer in wrappers(model, AdapterLayer):
        if sources := [_Source(layer, name, w) for name, w in zip(names, weights, strict=True) if name in layer.adapter_names()]:
            made[path] = recipe.apply(path, sources)
    attach(model, _config(model, [state.configs[name] for name in names], made), new_name)
    for path, matrices in made.items():
        model.get_submodule(path).set_matrices(new_name, matrices)
    _copy_whole_modules(model, names, new_name)
    return model


class _Source:
    """One adapter in one layer."""

    def __init__(self, layer: AdapterLayer, name: str, weight: float):
        self.name, self.weight = name, weight
        self.matrices: Matrices = layer.matrices(name)
        self.scales = {label: layer.matrix_scale(name, label) for label in self.matrices}


@dataclass
class _Recipe:
    method: str
    rank: int | None
    density: float | None
    majority: str
    generator: torch.Generator

    def apply(self, path: str, sources: list[_Source]) -> Matrices:
        """The new factors of a layer, of scale 1."""
        labels = dict.fromkeys(label for source in sources for label in source.matrices)
        step = self._step()
        return {label: step(f"{path}{label}", label, [s for s in sources if label in s.matrices]) for label in labels}

    def _step(self) -> Callable[[str, str, list[_Source]], tuple[torch.Tensor, torch.Tensor]]:
        if self.method in ("cat", "svd"):
            return self._exact
        return self._of_products if self.method.endswith("_svd") else self._of_factors

    def _rank(self, label: str, sources: list[_Source]) -> int:
        return self.rank or max(source.matrices[label][0].shape[1] for source in sources)

    def _exact(self, path: str, label: str, sources: list[_Source]) -> tuple[torch.Tensor, torch.Tensor]:
        A = torch.cat([s.matrices[label][0] * (s.weight * s.scales[label]) for s in sources], 1)
        B = torch.cat([s.matrices[label][1] for s in sources], 2)
        return (A, B) if self.method == "cat" else truncate(A, B, self._rank(label, sources))

    def _of_factors(self, path: str, label: str, sources: list[_Source]) -> tuple[torch.Tensor, torch.Tensor]:
        ranks = {source.name: source.matrices[label][0].shape[1] for source in sources}
        if len(set(ranks.values())) > 1:
            told = ", ".join(f"{name} {r}" for name, r in ranks.items())
            raise ValueError(f'method: {self.method!r} needs adapters of one rank, got {told} in {path}; use "cat" or "svd"')
        both = [s.weight * s.scales[label] for s in sources]
        roots = [math.sqrt(abs(w)) for w in both]
        signed = [math.copysign(root, w) for root, w in zip(roots, both, strict=True)]
        return (
            self._sum([s.matrices[label][0] for s in sources], signed, self.method),
            self._sum([s.matrices[label][1] for s in sources], roots, self.method),
        )

    def _of_products(self, path: str, label: str, sources: list[_Source]) -> tuple[torch.Tensor, torch.Tensor]:
        made, method = [], self.method.removesuffix("_svd")
        for matrix in range(sources[0].matrices[label][0].shape[0]):
            deltas = [s.matrices[label][1][matrix] @ s.matrices[label][0][matrix] * s.scales[label] for s in sources]
            total = self._sum(deltas, [s.weight for s in sources], method)
            made.append(low_rank_of(total, self._rank(label, sources)))
        return torch.stack([A for A, _ in made]), torch.stack([B for _, B in made])

    def _sum(self, tensors: list[torch.Tensor], weights: list[float], method: str) -> torch.Tensor:
        return weighted_sum(tensors, weights, method, self.density, self.majority, self.generator)


def _generator(seed: int | None) -> torch.Generator:
    return torch.Generator().manual_seed(draw_seed() if seed is None else seed)


def _config(model: nn.Module, configs: list[LoraConfig], made: dict[str, Matrices]) -> LoraConfig:
    """Selects just these layers, each with its own rank, and alpha = r."""
    ranks = {f"{path}{label}": A.shape[1] for path, matrices in made.items() for label, (A, _) in matrices.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    layers = [path for path, matrices in made.items() if "" in matrices]
    stacked = [f"{path}{label}" for path, matrices in made.items() for label in matrices if label]
    others = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != r}
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules="|".join(map(re.escape, layers)) or [],
        target_parameters=stacked or None,
        modules_to_save=sorted({name for c in configs for name in c.modules_to_save or ()}) or None,
        rank_pattern=others,
        alpha_pattern=dict(others),
        task_type=configs[0].task_type,
        base_model_name_or_path=configs[0].base_model_name_or_path,
    )
    modules = visible_modules(model, lambda module: isinstance(module, Wrapper))
    names = short_names(modules, layers, config)
    if set(matching(modules, names, config)) == set(layers):
        config.target_modules = names
    return config


def _copy_whole_modules(model: nn.Module, names: Sequence[str], new_name: str) -> None:
    for _, wrapper in wrappers(model, ModuleToSave):
        for name in names:
            if name in wrapper.adapter_names() and new_name in wrapper.adapter_names():
                wrapper.modules_to_save[new_name].load_state_dict(wrapper.modules_to_save[name].state_dict())


def _check(
    names: Sequence[str], weights: Sequence[float], method: str, rank: int | None, density: float | None, majority: str
) -> None:
    if isinstance(names, str) or not len(names) or len(set(names)) != len(names):
        raise ValueError(f"names: expected a list of different adapters, got {names!r}")
    if len(weights) != len(names) or not all(math.isfinite(w) for w in weights):
        raise ValueError(f"weights: expected a finite number for each of {len(names)} adapters, got {list(weights)}")
    if method not in ALL_METHODS:
        raise ValueError(f"method: expected one of {', '.join(ALL_METHODS)}, got {method!r}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1 or not method.endswith("svd")):
        raise ValueError(f"rank: expected a positive integer, with a method that ends in svd, got {rank!r} with {method!r}")
    prunes = method not in ("cat", "linear", "svd")
    if prunes and (density is None or not 0 < density <= 1):
        raise ValueError(f"density: expected a share in (0, 1] for {method!r}, got {density}")
    if not prunes and density is not None:
        raise ValueError(f"density: expected None for {method!r}, which prunes nothing, got {density}")
    if majority not in MAJORITY:
        raise ValueError(f"majority_sign_method: expected one of {', '.join(MAJORITY)}, got {majority!r}")


def _check_adapters(model: nn.Module, state: Attached, names: Sequence[str]) -> None:
    """ValueError for what has no sum."""
    for name in names:
        config = state.configs[name]
        if config.peft_type != LoraConfig.peft_type:
            raise ValueError(f"names: expected LoRA adapters, got {name!r}, a {type(config).__name__}")
        if config.use_dora:
            raise ValueError(f"names: expected adapters without DoRA, got {name!r}: magnitudes have no weighted sum")
        if state.biases is not None and state.biases.owner == name:
            raise ValueError(f"names: expected adapters that leave the base's biases alone, got {name!r}, which trains them")
    for path, layer in wrappers(model, AdapterLayer):
        for name in names:
            if name in layer.adapter_names() and (reason := layer.why_no_merge(name)):
                raise ValueError(f"names: {name!r} in {path} can't be combined, {reason}")
    for path, wrapper in wrappers(model, ModuleToSave):
        if len(whole := [name for name in names if name in wrapper.adapter_names()]) > 1:
            raise ValueError(
                f"names: {path} is trained whole by {', '.join(whole)}: such modules can't be combined: leave these out"
            )
