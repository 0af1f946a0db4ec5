"""EVA (Paischer et al. 2024): A starts as the main directions of a layer's inputs, and ranks go where these explain most.

B stays zero, so that the model starts as it was; the weights are not read, whether dense or in 4 bits.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from peftk.methods.adapter import Wrapper
from peftk.methods.attach import attached, known, set_adapter, take_out, wrappers
from peftk.methods.incremental_svd import IncrementalSVD
from peftk.methods.lora import LoraConfig
from peftk.methods.lora_linear import LoraLinear
from peftk.methods.merge import disable_adapters
from peftk.methods.targets import pattern_value, short_names, visible_modules

logger = logging.getLogger("peftk")


@dataclass
class _Shared:
    """Layers with one and the same input, and what is known of it."""

    svd: IncrementalSVD
    layers: list[str] = field(default_factory=list)  # paths
    ranks: dict[str, int] = field(default_factory=dict)  # the largest that each may get


def eva_init(
    model: nn.Module,
    dataloader: Iterable[Any],
    adapter_name: str = "default",
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int = 1000,
) -> nn.Module:
    """Start a fresh adapter with ``init_lora_weights="eva"`` from data, in place; ranks change, so make the optimizer after.
    Returns the model.

    Batches are taken, from the beginning again after the last, until the directions that are used stay where they are
    (``eva_config.tau``), at most ``max_batches``; a warning then says how many layers had not settled. ``forward(model, batch)``
    runs the model; None: keywords of a dict, arguments of a tuple, or the batch itself, on the model's device. Of a dict,
    positions that its attention_mask, or its labels (``use_label_mask``), leave out don't count.

    A layer may get up to ``rho`` times its rank, and one whose inputs explain least may lose its adapter; the sum of the ranks
    stays. The config then has each layer's rank and alpha in its patterns. ValueError: an adapter with another start, one that
    is trained already, merged adapters, or no batch; the model is then as before.
    """
    config = _check(model, adapter_name)
    if not isinstance(max_batches, int) or max_batches < 1:
        raise ValueError(f"max_batches: expected at least 1, got {max_batches!r}")
    if not isinstance(dataloader, Iterable):
        raise TypeError(f"dataloader: expected batches, got {type(dataloader).__name__}")
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), disable_adapters(model):
            shared, ranks = _search(model, dataloader, adapter_name, config, forward or _forward, max_batches)
    finally:
        model.train(training)
    _apply(model, adapter_name, config, shared, ranks)
    return model


def _check(model: nn.Module, name: str) -> LoraConfig:
    state = attached(model)
    known(state, name, "adapter_name")
    config = state.configs[name]
    if not isinstance(config, LoraConfig) or config.init_lora_weights != "eva":
        got = getattr(config, "init_lora_weights", type(config).__name__)
        raise ValueError(f'adapter_name: expected an adapter with init_lora_weights="eva", got {name!r} with {got!r}')
    if state.merged:
        raise ValueError(f"model: expected one without merged adapters, got one with {', '.join(state.merged)}; unmerge first")
    for path, layer in _layers(model, name).items():
        if layer.lora_B[name].any():
            raise ValueError(f"adapter_name: expected a fresh adapter, got {name!r}, which is trained: B isn't zero in {path}")
    return config


def _layers(model: nn.Module, name: str) -> dict[str, LoraLinear]:
    return {path: layer for path, layer in wrappers(model, LoraLinear) if name in layer.adapter_names()}


def _search(
    model: nn.Module,
    dataloader: Iterable[Any],
    name: str,
    config: LoraConfig,
    forward: Callable[[nn.Module, Any], Any],
    max_batches: int,
) -> tuple[list[_Shared], dict[str, int]]:
    layers, shared, ranks = _layers(model, name), [], {}
    for batch in itertools.islice(_again_and_again(dataloader), max_batches):
        batch = _on_device(batch, next(model.parameters()).device)
        if not shared:
            shared = _shared_inputs(layers, name, config.eva_config.rho, partial(forward, model, batch))
        mask = _counted(batch, config)
        handles = [layers[group.layers[0]].register_forward_pre_hook(_hook(group.svd, mask, config)) for group in shared]
        try:
            forward(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        ranks = _distribute(shared, sum(layer.lora_A[name].shape[0] for layer in layers.values()))
        if all(_is_settled(group, ranks) for group in shared):
            return shared, ranks
    if not shared:
        raise ValueError("dataloader: expected at least one batch, got none")
    open_ones = sum(len(group.layers) for group in shared if not _is_settled(group, ranks))
    logger.warning("EVA: the directions of %d of %d layers had not settled after the last batch", open_ones, len(layers))
    return shared, ranks


def _again_and_again(dataloader: Iterable[Any]) -> Iterator[Any]:
    """Its batches, from the beginning again after the last, until an iteration brings none."""
    is_empty = False
    while not is_empty:
        is_empty = True
        for batch in dataloader:
            is_empty = False
            yield batch


def _shared_inputs(layers: dict[str, LoraLinear], name: str, rho: float, run: Callable[[], Any]) -> list[_Shared]:
    """Layers by their input, found in one forward pass; ValueError names a layer that it does not reach."""
    inputs: dict[str, torch.Tensor] = {}  # held, so that no address is used again

    def note(_: nn.Module, arguments: tuple[torch.Tensor, ...], path: str) -> None:
        inputs.setdefault(path, arguments[0])

    handles = [layer.register_forward_pre_hook(partial(note, path=path)) for path, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if missing := [path for path in layers if path not in inputs]:
        raise ValueError(f"dataloader: expected batches that reach all layers of {name!r}, got none for {', '.join(missing[:8])}")
    groups: dict[int, list[str]] = {}
    for path, x in inputs.items():
        groups.setdefault(id(x), []).append(path)
    shared = []
    for paths in groups.values():
        ranks = {p: _largest(layers[p], name, rho) for p in paths}
        shared.append(_Shared(IncrementalSVD(max(ranks.values())), paths, ranks))
    return shared


def _largest(layer: LoraLinear, name: str, rho: float) -> int:
    return min(round(layer.lora_A[name].shape[0] * rho), layer.in_features, layer.out_features)


def _hook(svd: IncrementalSVD, mask: torch.Tensor | None, config: LoraConfig) -> Callable[..., None]:
    def take_in(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0]
        rows = x[mask] if mask is not None and x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1])
        if len(rows):
            svd.update(rows, config.eva_config.tau)

    return take_in


def _counted(batch: Any, config: LoraConfig) -> torch.Tensor | None:
    """Which positions (b, t) of a batch count; None: all."""
    if not isinstance(batch, Mapping):
        return None
    masks = [batch["attention_mask"].bool()] if isinstance(batch.get("attention_mask"), torch.Tensor) else []
    if config.eva_config.use_label_mask and isinstance(batch.get("labels"), torch.Tensor):
        masks.append(batch["labels"] != config.eva_config.label_mask_value)
    masks = [mask for mask in masks if mask.dim() == 2 and mask.shape == masks[0].shape]
    return torch.stack(masks).all(0) if masks else None


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _on_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _on_device(value, device) for key, value in batch.items()}
    return type(batch)(_on_device(value, device) for value in batch) if isinstance(batch, tuple | list) else batch


def _distribute(shared: list[_Shared], budget: int) -> dict[str, int]:
    """The ``budget`` components that explain the largest shares, counted by layer."""
    shares = {path: group.svd.shares()[: group.ranks[path]].tolist() for group in shared for path in group.layers}
    found = sorted(((share, path) for path, each in shares.items() for share in each), key=lambda pair: -pair[0])
    ranks = dict.fromkeys(shares, 0)
    for _, path in found[:budget]:
        ranks[path] += 1
    return ranks


def _is_settled(group: _Shared, ranks: dict[str, int]) -> bool:
    used = max(ranks[path] for path in group.layers)
    return len(group.svd.settled) == group.svd.count and bool(group.svd.settled[:used].all())


def _apply(model: nn.Module, name: str, config: LoraConfig, shared: list[_Shared], ranks: dict[str, int]) -> None:
    layers, alphas = _layers(model, name), {}
    for group in shared:
        for path in group.layers:
            r, before = ranks[path], layers[path].lora_A[name].shape[0]
            alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
            alphas[path] = alpha * r / before if config.eva_config.adjust_scaling_factors else alpha
            if r == 0:
                layers[path].delete_adapter(name)
                continue
            A = group.svd.components[:r]
            A = A / group.svd.values[:r, None].sqrt() if config.eva_config.whiten else A
            layers[path].set_directions(name, A, config.scaling_of(r, alphas[path]))
    take_out(model, [layer for layer in layers.values() if not layer.adapter_names()])
    _write_config(model, config, {path: r for path, r in ranks.items() if r}, alphas)
    set_adapter(model, attached(model).active)
    logger.info("EVA: ranks %s", ", ".join(f"{path} {r}" for path, r in ranks.items()))


def _write_config(model: nn.Module, config: LoraConfig, ranks: dict[str, int], alphas: dict[str, float]) -> None:
    config.rank_pattern = {f"^{re.escape(path)}": r for path, r in ranks.items() if r != config.r}
    config.alpha_pattern = {f"^{re.escape(path)}": alphas[path] for path in ranks if alphas[path] != config.lora_alpha}
    modules = visible_modules(model, lambda module: isinstance(module, Wrapper))
    config.target_modules = short_names(modules, list(ranks), config)
