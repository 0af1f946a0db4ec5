"""Where virtual tokens stand in a batch: a column of the longer batch is a real token, a virtual one, a fixed one or padding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

NOTHING = -1


@dataclass
class Row:
    """One sequence, as lists of equal length; NOTHING where a column is something else."""

    source: list[int]  # column of the real token
    slot: list[int]  # index of the virtual token
    fixed: list[int]  # token id that a template brings

    def __add__(self, other: Row) -> Row:
        return Row(self.source + other.source, self.slot + other.slot, self.fixed + other.fixed)

    def __len__(self) -> int:
        return len(self.source)

    def padded(self, n: int, is_left: bool) -> Row:
        """With ``n`` columns of padding."""
        pad = Row(*([NOTHING] * n for _ in range(3)))
        return pad + self if is_left else self + pad


def real(columns: Iterable[int]) -> Row:
    """Real tokens, by their columns."""
    columns = list(columns)
    return Row(columns, [NOTHING] * len(columns), [NOTHING] * len(columns))


def virtual(slots: Iterable[int]) -> Row:
    """Virtual tokens, by their indices."""
    slots = list(slots)
    return Row([NOTHING] * len(slots), slots, [NOTHING] * len(slots))


def fixed(ids: list[int]) -> Row:
    """A template's own tokens, by their ids."""
    return Row([NOTHING] * len(ids), [NOTHING] * len(ids), list(ids))


class Layout:
    """A batch's rows, (b, length) each: ``source``, ``slot`` and ``fixed`` as Row has them. Shorter rows are padded: on the left
    for causal models, whose last column is the last token, else on the right, where the first column is the first token."""

    def __init__(self, rows: list[Row], batch: int, is_left: bool, device: torch.device):
        length = max(len(row) for row in rows)
        rows = [row.padded(length - len(row), is_left) for row in rows]
        tables = torch.tensor([[row.source, row.slot, row.fixed] for row in rows], device=device)
        self.source, self.slot, self.fixed = (part.expand(batch, length) for part in tables.unbind(1))
        self.length = length
        self.may_pad = len(rows) > 1

    def carry(self, values: torch.Tensor, virtual: float, filler: float, fixed: torch.Tensor | None = None) -> torch.Tensor:
        """(b, s) or (b, s, d) of the short batch -> (b, length) or (b, length, d): ``virtual`` at virtual and fixed tokens
        (``fixed`` at these, where given), ``filler`` at padding."""
        columns = self.source.clamp(min=0)
        is_real, is_padding = self.source != NOTHING, self.is_padding()
        if values.dim() == 3:
            columns = columns[..., None].expand(-1, -1, values.shape[-1])
            is_real, is_padding = is_real[..., None], is_padding[..., None]
        carried = torch.where(is_real, values.gather(1, columns), torch.full_like(values[:, :1], virtual))
        if fixed is not None:
            carried = torch.where(self.fixed != NOTHING, fixed.to(carried.dtype), carried)
        return torch.where(is_padding, torch.full_like(values[:, :1], filler), carried)

    def is_padding(self) -> torch.Tensor:
        """(b, length), of the padding that the layout adds."""
        return (self.source == NOTHING) & (self.slot == NOTHING) & (self.fixed == NOTHING)

    def mask(self, mask: torch.Tensor | None, batch: int) -> torch.Tensor | None:
        """The attention mask of the long batch; None where nothing is masked."""
        if mask is None:
            if not self.may_pad:
                return None
            return (~self.is_padding()).long()
        return self.carry(mask, 1, 0)

    def new_columns(self, old: torch.Tensor) -> torch.Tensor:
        """(b,) columns of the short batch -> where they stand now; those beyond it stay beyond."""
        found = self.source == old[:, None]
        return torch.where(found.any(1), found.int().argmax(1), self.length)


def positions(mask: torch.Tensor, length: int) -> torch.Tensor:
    """Position ids (b, length) of the last columns: how many tokens that the mask keeps stand before. Padding behind the last
    token is counted on, as models do without a mask; padding before or between tokens is not counted."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    kept = mask != 0
    behind = columns - (kept * columns).amax(1, keepdim=True)
    return ((kept.cumsum(1) - 1).clamp(min=0) + behind.clamp(min=0))[:, -length:]
