"""Paging on a CPU: tensors over a file that is mapped into memory.

One sparse file a pager, unlinked as it is made: no other process can open it, and it goes with the process, however that ends.
A chunk leaves memory in three steps: write back, unmap, drop from the page cache. MADV_DONTNEED alone keeps a shared file's
pages cached, and MADV_PAGEOUT leaves dirty ones where they are (both seen by mincore on Linux 6.18).
Chunks of 2 MB come and go as one huge page where the file system has large folios: a sixth of the processor time that single
pages take. MADV_RANDOM keeps the kernel from reading beyond what was asked for.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

import torch

from peftk.paging.engine import Memory
from peftk.paging.page_file import HUGE, PageFile
from peftk.paging.window import Chunk

CHUNKS_IN_BUDGET = 16  # at least, so that a small budget isn't one chunk
MOVERS = 4  # threads that move chunks: requests under way at the disk


class MappedFile:
    """The engine; see ``peftk.paging.engine.Engine``. ``budget`` in bytes sets the chunks' size."""

    def __init__(self, budget: int | None, folder: str | os.PathLike | None, allow_tmpfs: bool) -> None:
        self.chunk_bytes = chunk_bytes(budget)
        self._file = PageFile(folder, allow_tmpfs, self.chunk_bytes)
        self._movers = ThreadPoolExecutor(MOVERS, "peftk-paging")

    def allocate(self, nbytes: int) -> Memory:
        return self._file.map(nbytes)

    def check_room(self, nbytes: int) -> None:
        self._file.check_room(nbytes)

    def tensor(self, owner: Any, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        offset = address - ctypes.addressof(owner)
        return torch.frombuffer(owner, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)

    def move(self, out: Sequence[Chunk], into: Sequence[Chunk]) -> None:
        """A mover's task is a chunk that comes in, after one that leaves for it: so the budget holds at every moment."""
        spare = len(into) - len(out)
        for leaving, coming in zip_longest([None] * spare + list(out), into):
            before = [chunk.moving for chunk in (leaving, coming) if chunk is not None and chunk.moving is not None]
            owners = [chunk.owner() for chunk in (leaving, coming) if chunk is not None]
            coming.moving = self._movers.submit(self._exchange, leaving, coming, before, owners)
            if leaving is not None:
                leaving.moving = coming.moving

    def wait(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            if (moving := chunk.moving) is not None:
                chunk.moving = None
                moving.result()

    def used(self, chunks: Sequence[Chunk]) -> None:
        """Nothing to mark: on a CPU the work is done when the body ends."""

    def close(self) -> None:
        self._movers.shutdown(wait=False)

    def _exchange(self, leaving: Chunk | None, coming: Chunk, before: list[Future], owners: list[Any]) -> None:
        """``before``: earlier moves of the same chunks, which the movers have taken up in their order. ``owners`` keep the memory
        mapped meanwhile; None for one that died."""
        for move in before:
            move.exception()
        if leaving is not None and owners[0] is not None:
            self._file.page_out(leaving.address, leaving.place, self.chunk_bytes)
        if owners[-1] is not None:
            self._file.page_in(coming.address, self.chunk_bytes)


def chunk_bytes(budget: int | None) -> int:
    """A huge page, or less where the budget is small; whole pages."""
    page = os.sysconf("SC_PAGESIZE")
    most = HUGE if budget is None else min(HUGE, budget // CHUNKS_IN_BUDGET)
    return max(most // page, 1) * page
