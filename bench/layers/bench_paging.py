"""`optimizer.step()` of AdamW whose moments are paged to a file: with a budget that holds them all, beside the same without
paging; with half of that, beside the disk's own rate for the bytes that a step moves.

The disk's rate is that of plain direct writes and reads of as many bytes, in the same folder, in turn with the steps.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator

import torch

from bench.goals import Goal
from bench.measure import Candidate, Case, Work
from peftk.optim import AdamW
from peftk.paging import stats

TESTS = ("tests/paging/test_mapped.py", "tests/optim/test_pages.py")
HEADLINE = "half"
REQUEST = 8 << 20  # bytes that the disk is asked for at once
SETTLED = 3  # steps until the window knows the period of a step
UNPAGED, DISK = "peftk unpaged", "disk, the same bytes"


def cases(size: int) -> Iterator[Case]:
    shape, count = f"{4 * size}x{size} fp32", 4 * size * size
    work = Work(read=16 * count, write=12 * count, flop=15 * count, dtype=torch.float32)
    whole = Candidate("peftk", stepping(size, paged=True, budget=2 * 8 * count))
    yield Case(f"enough budget, {shape}", work, [whole, Candidate(UNPAGED, stepping(size))], Goal(UNPAGED, 1 / 1.05))
    half = stepping(size, paged=True, budget=4 * count)
    for _ in range(SETTLED):
        half()
    before = stats()
    half()
    out, into = stats().bytes_out - before.bytes_out, stats().bytes_in - before.bytes_in
    moved = Work(read=into, write=out)
    candidates = [Candidate("peftk", half), Candidate(DISK, streaming(out, into), work=moved)]
    yield Case(f"half of the budget, {shape}, {(out + into) / 1e6:.0f} MB moved", moved, candidates, Goal(DISK, 0.7))


def stepping(size: int, **options: object) -> Callable[[], None]:
    """A step of an optimizer of its own over one parameter of 4 * size x size."""
    parameter = torch.nn.Parameter(torch.randn(4 * size, size))
    parameter.grad = torch.randn_like(parameter)
    optimizer = AdamW([parameter], **options)

    def step() -> None:
        optimizer.step()

    return step


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
