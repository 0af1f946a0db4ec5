"""Adapters in the weights, and out of use: merge, unmerge, disable; the same functions for every method that adds to weights."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

import torch
from torch import nn

from peftk.methods.adapter import AdapterLayer, Wrapper
from peftk.methods.attach import attached, find_attached, known, refresh, wrappers
from peftk.methods.merge_report import MergeReport, report_of
from peftk.shards import check_whole

logger = logging.getLogger("peftk")
INSTEAD_OF_MERGING = (
    "save the adapter (peftk.save_adapter gathers it), and in one process load it on the base model (peftk.load_adapter) and "
    "merge there"
)
_Work = list[tuple[str, Wrapper, list[str]]]  # path, module, the names to merge that it has


@overload
def merge(
    model: nn.Module,
    adapter_names: str | Sequence[str] | None = None,
    safe: bool = True,
    keep_original: bool = True,
    dry_run: Literal[False] = False,
) -> nn.Module: ...


@overload
def merge(
    model: nn.Module,
    adapter_names: str | Sequence[str] | None = None,
    safe: bool = True,
    keep_original: bool = True,
    *,
    dry_run: Literal[True],
) -> MergeReport: ...


def merge(
    model: nn.Module,
    adapter_names: str | Sequence[str] | None = None,
    safe: bool = True,
    keep_original: bool = True,
    dry_run: bool = False,
) -> nn.Module | MergeReport:
    """Add adapters (the active ones if None) to the weights: all of them in fp32, then one rounding or quantisation a weight.
    Returns the model, which then runs at the base's cost.

    ValueError for what no weight can hold: prompts, prefixes, some convolutions with groups; and for a model that is split among
    processes: no one of them has a whole weight to round.
    ``safe``: every weight is checked for NaN and Inf before any is changed; ValueError names the layer and the adapter.
    ``keep_original``: the original bytes are kept, so that ``unmerge`` is exact, and so that a merge that fails on the way puts
    back what it has changed; without them such a failure is a RuntimeError. A weight that is tied to another module's is
    untied, with a warning. ``dry_run``: nothing is changed; returns how far each weight, as it would be stored, lies from the
    fp32 sum. ValueError then for a model with merged adapters.
    """
    state = attached(model)
    check_whole(model, "model", INSTEAD_OF_MERGING)
    before = list(state.merged)
    names = known(state, state.active if adapter_names is None else adapter_names, "adapter_names")
    new = [name for name in names if name not in before]
    if dry_run and before:
        raise ValueError(f"dry_run: expected a model without merged adapters, got one with {', '.join(before)}; unmerge first")
    if not new and not dry_run:
        return model
    _check_can_merge(model, new)
    if before and state.kept_original:
        return _merge_together(model, before, new, safe, keep_original)
    work = _work(model, new)
    if safe:
        for path, layer, here in work:
            _check_finite(path, layer, here)
    if dry_run:
        return report_of((path, layer, here) for path, layer, here in work if isinstance(layer, AdapterLayer))
    _commit(model, work, keep_original and not before)
    state.kept_original = keep_original and not before
    state.merged = [*before, *new]
    refresh(model, state)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Put the original bytes back, exactly, and use the adapters beside them again. Returns the model. RuntimeError where the
    bytes weren't kept; nothing is changed then."""
    state = attached(model)
    if state.merged:
        check_whole(model, "model", "unmerge before it is split")
    if state.merged and not state.kept_original:
        raise RuntimeError("model: expected one merged with keep_original=True, got one whose original weights were not kept")
    for _, wrapper in wrappers(model):
        if isinstance(wrapper, AdapterLayer) and wrapper.merged:
            wrapper.unmerge()
        wrapper.merged = []
    state.merged, state.kept_original = [], True
    refresh(model, state)
    return model


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` the model computes as without adapters; contexts nest. Merged adapters are unmerged for its length:
    RuntimeError where the original weights weren't kept."""
    state = attached(model)
    merged = list(state.merged) if state.disabled == 0 else []
    if merged:
        unmerge(model)
    state.disabled += 1
    refresh(model, state)
    try:
        yield
    finally:
        state.disabled -= 1
        if find_attached(model) is state:
            refresh(model, state)
            if merged:
                merge(model, merged, safe=False)


def _work(model: nn.Module, names: Sequence[str]) -> _Work:
    work = [(path, wrapper, [n for n in names if n in wrapper.adapter_names()]) for path, wrapper in wrappers(model)]
    return [(path, wrapper, here) for path, wrapper, here in work if here]


def _merge_together(model: nn.Module, before: list[str], new: list[str], safe: bool, keep_original: bool) -> nn.Module:
    """From the original weights, so that all are summed before the one rounding."""
    unmerge(model)
    try:
        return merge(model, [*before, *new], safe, keep_original)
    except BaseException:
        merge(model, before, safe=False)
        raise


def _commit(model: nn.Module, work: _Work, keep_original: bool) -> None:
    """Change the weights: all of them, or, where the original bytes are kept, none."""
    owners = _weight_owners(model)
    for path, wrapper, here in work:
        try:
            _merge_one(path, wrapper, here, keep_original, owners)
        except BaseException as error:
            if keep_original:
                _roll_back(work)
                raise
            raise RuntimeError(
                f"{path}: the merge failed here, and layers before it have changed for good (keep_original=False): {error}"
            ) from error


def _merge_one(path: str, wrapper: Wrapper, names: list[str], keep_original: bool, owners: dict[int, list[str]]) -> None:
    if not isinstance(wrapper, AdapterLayer):
        wrapper.merged = [*wrapper.merged, *names]
        return
    is_tied = len(owners[id(wrapper.weight)]) > 1
    if is_tied:
        _warn_of_untying(path, owners[id(wrapper.weight)])
    wrapper.merge(names, keep_original, is_tied)


def _roll_back(work: _Work) -> None:
    for _, wrapper, _ in work:
        if isinstance(wrapper, AdapterLayer) and wrapper.keeps_original():
            wrapper.unmerge()
        wrapper.merged = []


def _check_can_merge(model: nn.Module, names: list[str]) -> None:
    for path, wrapper in wrappers(model):
        have = [name for name in names if name in wrapper.adapter_names()]
        if have and not wrapper.can_merge:
            raise ValueError(
                f"adapter_names: expected adapters of weights, got {', '.join(have)}, which adds to the inputs or the keys and "
                "values: no weight can hold it; nothing was merged"
            )
        for name in have if isinstance(wrapper, AdapterLayer) else ():
            if reason := wrapper.why_no_merge(name):
                raise ValueError(f"{path}: {name!r} can't be merged, {reason}; nothing was merged")


@torch.no_grad()
def _check_finite(path: str, layer: Wrapper, names: list[str]) -> None:
    """As the weight will be stored: a sum may leave fp16's range."""
    for part in layer.parts(names) if isinstance(layer, AdapterLayer) else ():
        w = part.merged_weight(names)
        stored = part.weight.dtype if part.weight.dtype.is_floating_point else w.dtype
        if not torch.isfinite(w.to(stored)).all():
            broken = _broken_adapters(part, names) or names
            raise ValueError(
                f"{path}{part.label}: expected finite merged weights, got NaN or Inf with {', '.join(broken)}; nothing was merged"
            )


def _broken_adapters(part: Any, names: list[str]) -> list[str]:
    """Those that aren't finite by themselves."""
    return [name for name in names if not torch.isfinite(part.delta_weight(name)).all()]


def _weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """By id of a parameter the paths of the modules that have it."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(path)
    return owners


def _warn_of_untying(path: str, owners: list[str]) -> None:
    others = ", ".join(owner for owner in owners if owner.removesuffix(".base_layer") != path)
    logger.warning(
        "%s: its weight is tied to that of %s; the merged weight is its own now. To save the model, switch its config's "
        "tie_word_embeddings off",
        path,
        others,
    )
