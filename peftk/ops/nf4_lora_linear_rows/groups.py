"""Which rows of x, flattened to (m, k), are whose."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def repeats(x: torch.Tensor) -> int:
    """Rows of x (b, ..., k) that stand for one entry of an index of b."""
    return x.shape[1:-1].numel()


def rows_by_adapter(index: Sequence[int], x: torch.Tensor, adapters: int) -> list[list[int]]:
    """Of every adapter its rows, in their order."""
    each, found = repeats(x), [[] for _ in range(adapters)]
    for i, adapter in enumerate(index):
        if adapter >= 0:
            found[adapter] += range(i * each, (i + 1) * each)
    return found


def counts(index: Sequence[int], x: torch.Tensor, adapters: int) -> list[int]:
    """Of every adapter how many."""
    return [repeats(x) * index.count(adapter) for adapter in range(adapters)]
