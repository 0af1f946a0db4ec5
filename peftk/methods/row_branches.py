"""A layer's adapters when each row of a batch has its own: which branch is whose, in one op with the base layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from peftk.methods.adapter import AdapterLayer
from peftk.ops.philox_dropout import draw_seed, philox_dropout

Branches = list[tuple[torch.Tensor, torch.Tensor, float, float]]  # A (r, k), B (n, r), scale, dropout
Add = Callable[[torch.Tensor, torch.Tensor, Branches], torch.Tensor]  # y, x, branches -> y with them


def forward_rows(layer: AdapterLayer, x: torch.Tensor, branches: Callable[[tuple[str, ...]], Branches], add: Add) -> torch.Tensor:
    """y of a linear layer whose row i has the branches of the i-th of ``layer.by_row()``: the first of each in one op with the
    base layer, what others there are by ``add``."""
    by_row = layer.spread(layer.by_row(), x.shape[0])
    found = {names: of_names for names in dict.fromkeys(by_row) if (of_names := branches(names))}
    if not found:
        return layer.base_layer.forward(x)
    numbers = {names: number for number, names in enumerate(found)}
    index = [numbers.get(names, -1) for names in by_row]
    A, B, scale, dropout = zip(*(of_names[0] for of_names in found.values()), strict=True)
    z = _dropped(x, index, dropout) if any(dropout) else None
    y = layer.base_layer.forward_low_rank_rows(x, A, B, scale, index, z)
    for number, (_, *others) in enumerate(found.values()):
        if others:
            rows = _rows(index, number, x)
            y = y.index_copy(0, rows, add(y[rows], x[rows], others))
    return y


def _dropped(x: torch.Tensor, index: Sequence[int], dropout: Sequence[float]) -> torch.Tensor:
    """The branches' input: each adapter's rows of x with its own dropout."""
    z = x
    for number, p in enumerate(dropout):
        if p > 0:
            rows = _rows(index, number, x)
            z = z.index_copy(0, rows, philox_dropout(x[rows], p, draw_seed()))
    return z


def _rows(index: Sequence[int], number: int, x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([row for row, one in enumerate(index) if one == number], device=x.device)
