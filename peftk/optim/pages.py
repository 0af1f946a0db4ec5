"""Moments that may leave memory between two steps: allocated by a pager, worked through piece by piece, the next piece fetched
while this one is updated (Dettmers et al. 2023, QLoRA, section 3)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from peftk.format.dynamic8 import STATE_BLOCK
from peftk.ops.step_lists import StepOp
from peftk.optim.stepping import Call, Contiguous
from peftk.paging import Pager

PIECE_WITHOUT_BUDGET = 128 << 20  # bytes of moments; a staged piece lies on the GPU twice
PIECES_IN_BUDGET = 4  # one is updated, one arrives, one leaves; tensors and pieces share pages at their ends


@dataclass
class Piece:
    """Parameters, or a slice of one, that are updated while their moments are resident. All tensors are flat."""

    op: StepOp
    coefficients: Sequence[float]
    params: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    moments: list[list[torch.Tensor]] = field(default_factory=list)

    def add(self, param: torch.Tensor, grad: torch.Tensor, moments: Sequence[torch.Tensor]) -> None:
        self.params.append(param)
        self.grads.append(grad)
        self.moments = self.moments or [[] for _ in moments]
        for tensors, tensor in zip(self.moments, moments, strict=True):
            tensors.append(tensor)

    def resident(self) -> list[torch.Tensor]:
        """What has to be resident, list after list."""
        return [tensor for tensors in self.moments for tensor in tensors]

    def halves(self) -> list[Piece]:
        """Two with half of the parameters each, or of a single one's blocks; just this one where there is a block alone."""
        lists = [self.params, self.grads, *self.moments]
        if len(self.params) > 1:
            middle = len(self.params) // 2
            return [self._with([tensors[part] for tensors in lists]) for part in (slice(middle), slice(middle, None))]
        count = self.params[0].numel()
        middle = -(-count // STATE_BLOCK) // 2 * STATE_BLOCK
        if not middle:
            return [self]
        return [self._with([[_slice(t, *part, count)] for (t,) in lists]) for part in ((0, middle), (middle, count))]

    def _with(self, lists: list[list[torch.Tensor]]) -> Piece:
        return Piece(self.op, self.coefficients, lists[0], lists[1], lists[2:])


class Pages:
    """The pagers of an optimizer, one a device. ``budget``: bytes of moments that may be resident on each; ``folder``: of the
    page file (CPU only)."""

    def __init__(self, budget: int | None, folder: str | os.PathLike | None) -> None:
        self.budget, self.folder = budget, folder
        self._pagers: dict[torch.device, Pager] = {}

    def full(self, shape: Sequence[int], value: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """As torch.full; on the way too, no more than the budget is resident."""
        made = self._pager(device).empty(tuple(shape), dtype)
        if value:
            self._write(made, lambda here, start: here.fill_(value))
        return made

    def copied(self, source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A contiguous copy."""
        flat = source.reshape(-1)
        made = self._pager(source.device).empty(tuple(source.shape), dtype)
        self._write(made, lambda here, start: here.copy_(flat[start : start + here.numel()]))
        return made

    def check_room(self, needed: Mapping[torch.device, int]) -> None:
        """OSError where a page file can't be made, or its disk has no room for so many bytes of moments more. On a GPU they lie
        in host memory, which says so itself."""
        for device, nbytes in needed.items():
            if device.type == "cpu":
                self._pager(device).check_room(nbytes)

    def run(self, work: Sequence[tuple[Call, Sequence[float]]]) -> None:
        """All calls of a step with their coefficients."""
        by_device: dict[torch.device, list[tuple[Call, Sequence[float]]]] = {}
        for call, coefficients in work:
            by_device.setdefault(call.params[0].device, []).append((call, coefficients))
        for device, calls in by_device.items():
            self._run(self._pagers[device], calls)

    def _write(self, tensor: torch.Tensor, write: Callable[[torch.Tensor, int], Any]) -> None:
        """``write(part, first element)`` for one resident part after the other."""
        pager, start = self._pager(tensor.device), 0
        for part in tensor.view(-1).split(max(self._limit() // tensor.element_size(), 1)) if tensor.numel() else ():
            with pager.resident([part]) as (here,):
                write(here, start)
            start += part.numel()

    def _pager(self, device: torch.device) -> Pager:
        if device not in self._pagers:
            self._pagers[device] = Pager(device, budget=self.budget, folder=self.folder)
        return self._pagers[device]

    def _run(self, pager: Pager, work: Sequence[tuple[Call, Sequence[float]]]) -> None:
        with contextlib.ExitStack() as copies:
            pieces = (
                piece for call, c in work for piece in _pieces(call, c, copies.enter_context(Contiguous(call)), self._limit())
            )
            made = [part for piece in pieces for part in _fitting(pager, piece)]
            for piece, following in zip(made, [*made[1:], made[0]], strict=True):
                upcoming = following.resident() if following is not piece else []
                with pager.resident(piece.resident(), upcoming=upcoming) as tensors:
                    piece.op(piece.params, piece.grads, *_split(tensors, len(piece.moments)), piece.coefficients)

    def _limit(self) -> int:
        """Bytes of moments in a piece."""
        return PIECE_WITHOUT_BUDGET if self.budget is None else self.budget // PIECES_IN_BUDGET


def _pieces(call: Call, coefficients: Sequence[float], tensors: tuple, limit: int) -> Iterator[Piece]:
    """A call's parameters in order, several to a piece or sliced between blocks, ``limit`` bytes of moments each."""
    op = call.formula.op(call.bits)
    piece, room = Piece(op, coefficients), limit
    for param, grad, *moments in zip(*tensors, *call.moments(), strict=True):
        size = sum(moment.nbytes for moment in moments) / max(param.numel(), 1)  # bytes of an element's moments
        start = 0
        while start < param.numel():
            fits = int(room / size) // STATE_BLOCK * STATE_BLOCK
            if not fits and piece.params:
                yield piece
                piece, room = Piece(op, coefficients), limit
                continue
            stop = min(start + max(fits, STATE_BLOCK), param.numel())
            piece.add(*(_slice(t, start, stop, param.numel()) for t in (param, grad)), [
                _slice(moment, start, stop, param.numel()) for moment in moments
            ])  # fmt: skip
            room -= (stop - start) * size
            start = stop
    if piece.params:
        yield piece


def _fitting(pager: Pager, piece: Piece) -> Iterator[Piece]:
    """The piece in parts whose moments can be resident at once. Where small parameters have other bits or another dtype than the
    large ones between them, their moments lie on more chunks than they fill."""
    if pager.fits(piece.resident()):
        yield piece
        return
    halves = piece.halves()
    if len(halves) == 1:
        lists = len(piece.moments)
        raise ValueError(
            f"budget: expected room for {STATE_BLOCK} elements' moments, which lie on a page in each of {lists} tensors, "
            f"got {pager.budget} bytes"
        )
    for half in halves:
        yield from _fitting(pager, half)


def _slice(tensor: torch.Tensor, start: int, stop: int, count: int) -> torch.Tensor:
    """Elements start … stop of a parameter of ``count``, flat; of a tensor with one value a block those of their blocks."""
    if tensor.numel() == count:
        return tensor.view(-1)[start:stop]
    return tensor[start // STATE_BLOCK : -(-stop // STATE_BLOCK)]


def _split(tensors: Sequence[torch.Tensor], parts: int) -> list[Sequence[torch.Tensor]]:
    """One list as ``parts`` of the same length."""
    length = len(tensors) // parts
    return [tensors[i * length : (i + 1) * length] for i in range(parts)]
