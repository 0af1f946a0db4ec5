"""`optimizer.step()` of AdamW whose moments are paged to a file: with a budget that holds them all, beside the same without
paging; with half of that, beside the disk's own rate for the bytes that a step moves.

The disk's rate is that of plain direct writes and reads of as many bytes, in the same folder, in turn with the steps.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.goals import Goal
from bench.measure import Candidate, Case, Work, relative_error
from peftk.optim import AdamW
from peftk.paging import stats

TESTS = ("tests/paging/test_mapped.py", "tests/optim/test_pages.py")
HEADLINE = "half"
REQUEST = 8 << 20  # bytes that the disk is asked for at once
SETTLED = 3  # steps until the window knows the period of a step
UNPAGED, DISK = "peftk unpaged", "disk, the same bytes"


class Stepping:
    """Steps of an optimizer of its own over one parameter of 4 * size x size; the same for the same seed."""

    def __init__(self, size: int, **options: Any) -> None:
        self.size, self.steps = size, 0
        generator = torch.Generator().manual_seed(0)
        self.parameter = torch.nn.Parameter(torch.randn(4 * size, size, generator=generator))
        self.parameter.grad = torch.randn(4 * size, size, generator=generator)
        self.optimizer = AdamW([self.parameter], **options)

    def __call__(self) -> torch.Tensor:
        self.optimizer.step()
        self.steps += 1
        return self.parameter.detach()

    def error(self, result: torch.Tensor) -> float:
        """Against as many steps without paging: 0, as paging moves bytes."""
        twin = Stepping(self.size)
        for _ in range(self.steps):
            expected = twin()
        return relative_error(result, expected)


def cases(size: int) -> Iterator[Case]:
    shape, count = f"{4 * size}x{size} fp32", 4 * size * size
    work = Work(read=16 * count, write=12 * count, flop=15 * count, dtype=torch.float32)
    enough = Stepping(size, paged=True, budget=2 * 8 * count)
    candidates = [Candidate("peftk", enough, enough.error), Candidate(UNPAGED, Stepping(size))]
    yield Case(f"enough budget, {shape}", work, candidates, Goal(UNPAGED, 1 / 1.05))
    half = Stepping(size, paged=True, budget=4 * count)
    for _ in range(SETTLED):
        half()
    before = stats()
    half()
    out, into = stats().bytes_out - before.bytes_out, stats().bytes_in - before.bytes_in
    moved = Work(read=into, write=out)
    candidates = [Candidate("peftk", half, half.error), Candidate(DISK, streaming(out, into))]
    yield Case(f"half of the budget, {shape}, {(out + into) / 1e6:.0f} MB moved", moved, candidates, Goal(DISK, 0.7))


def streaming(out: int, into: int) -> Callable[[], None]:
    """Direct writes of ``out`` bytes and reads of ``into``, one request after the other, in a file without a name in TMPDIR."""
    fd = os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600)
    os.posix_fallocate(fd, 0, max(out, into))
    buffer = mmap.mmap(-1, REQUEST)
    buffer.write(os.urandom(REQUEST))

    def stream() -> None:
        for start in range(0, out, REQUEST):
            os.pwritev(fd, [buffer], start)
        for start in range(0, into, REQUEST):
            os.preadv(fd, [buffer], start)

    return stream
