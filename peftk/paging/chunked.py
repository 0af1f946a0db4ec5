"""The store behind both kinds of paged memory: tensors cut from slabs of chunks, a window of chunks that are resident."""

from __future__ import annotations

import bisect
import math
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftk.paging.engine import Engine, Stats, check_tensor
from peftk.paging.window import Chunk, Window

SLAB_CHUNKS = 16  # of memory are taken at once, so that small tensors share chunks and little of a chunk stays empty
ALIGNMENT = 512  # bytes, of a tensor in a slab: what torch's allocators give


@dataclass(slots=True)
class _Slab:
    """Memory from which tensors are cut, front to back; it goes when the last of them dies."""

    address: int
    nbytes: int
    owner: weakref.ref
    chunks: list[Chunk]
    taken: int = 0


class ChunkedStore:
    """Over an engine; ``budget``: bytes that may be resident, None for no limit. See ``peftk.paging.engine.Store``."""

    def __init__(self, engine: Engine, budget: int | None) -> None:
        self.engine, self.budget = engine, budget
        self._window = Window(None if budget is None else budget // engine.chunk_bytes)
        self._slabs: list[_Slab] = []  # ascending by address
        # Finalisers run on any thread at any point: they only leave a note here.
        self._dead: deque[weakref.ref] = deque()
        self._counts = dict.fromkeys(("faults", "prefetched", "bytes_in", "bytes_out"), 0)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        slab, owner = self._slab_with(nbytes)
        address = slab.address + slab.taken
        slab.taken = min(slab.taken + -(-nbytes // ALIGNMENT) * ALIGNMENT, slab.nbytes)
        return self.engine.tensor(owner, address, shape, dtype)

    def check_room(self, nbytes: int) -> None:
        self.engine.check_room(nbytes)

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        return self._window.most is None or len(self._chunks_of(tensors, "tensors")) <= self._window.most

    def enter(self, tensors: Sequence[torch.Tensor], upcoming: Sequence[torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
        self._bury()
        needed, wanted = self._chunks_of(tensors, "tensors"), self._chunks_of(upcoming, "upcoming")
        self._bring(needed, wanted)
        for chunk in needed:
            chunk.in_use += 1
        self._fetch_ahead([chunk for chunk in wanted if not chunk.resident], {*needed, *wanted})
        return needed, list(tensors)

    def leave(self, mark: list[Chunk]) -> None:
        for chunk in mark:
            chunk.in_use -= 1
        self.engine.used(mark)

    def holds(self, tensor: torch.Tensor) -> bool:
        return bool(tensor.numel()) and self._slab_of(tensor) is not None

    def stats(self) -> Stats:
        self._bury()
        out = sum(chunk.stored and not chunk.resident for slab in self._slabs for chunk in slab.chunks)
        return Stats(len(self._window.chunks) * self.engine.chunk_bytes, out * self.engine.chunk_bytes, **self._counts)

    def close(self) -> None:
        self.engine.close()

    def _slab_with(self, nbytes: int) -> tuple[_Slab, Any]:
        """A slab with room, and its owner, alive: the one with the most room, or a new one."""
        self._bury()
        if self._slabs and (slab := max(self._slabs, key=lambda s: s.nbytes - s.taken)).nbytes - slab.taken >= nbytes:
            if (owner := slab.owner()) is not None:
                return slab, owner
        size = self.engine.chunk_bytes
        count = max(-(-nbytes // size), SLAB_CHUNKS)
        memory = self.engine.allocate(count * size)
        self._bury()  # its address may have been that of a slab that died meanwhile
        owner = weakref.ref(memory.owner, self._dead.append)
        chunks = [Chunk(memory.address + i * size, memory.place + i * size, owner) for i in range(count)]
        slab = _Slab(memory.address, count * size, owner, chunks)
        bisect.insort(self._slabs, slab, key=lambda s: s.address)
        return slab, memory.owner

    def _bury(self) -> None:
        """Take slabs whose tensors have died off the account."""
        while self._dead:
            dead = self._dead.popleft()
            for slab in [slab for slab in self._slabs if slab.owner is dead]:
                self._window.expel(slab.chunks)
                self._slabs.remove(slab)

    def _slab_of(self, tensor: torch.Tensor) -> _Slab | None:
        address = tensor.data_ptr()
        i = bisect.bisect_right(self._slabs, address, key=lambda s: s.address) - 1
        return self._slabs[i] if i >= 0 and address < self._slabs[i].address + self._slabs[i].nbytes else None

    def _chunks_of(self, tensors: Iterable[torch.Tensor], argument: str) -> list[Chunk]:
        """The chunks under the tensors, each once, in the tensors' order."""
        found: dict[Chunk, None] = {}
        for i, tensor in enumerate(tensors):
            if tensor.numel():
                slab = self._slab_of(tensor)
                check_tensor(tensor, slab is not None, f"{argument}[{i}]")
                start = tensor.data_ptr() - slab.address
                first, last = start // self.engine.chunk_bytes, (start + tensor.nbytes - 1) // self.engine.chunk_bytes
                found.update(dict.fromkeys(slab.chunks[first : last + 1]))
        return list(found)

    def _bring(self, needed: list[Chunk], wanted: list[Chunk]) -> None:
        """Make ``needed`` resident and wait for it; if need be, what was fetched ahead gives way."""
        missing = [chunk for chunk in needed if not chunk.resident]
        victims = self._window.victims(len(missing), {*needed, *wanted})
        if victims is None:
            victims = self._window.victims(len(missing), set(needed))
        if victims is None:
            nbytes = len(needed) * self.engine.chunk_bytes
            raise ValueError(f"tensors lie on {nbytes} bytes of whole chunks, the budget is {self.budget}: pass fewer or slices")
        self._counts["faults"] += sum(chunk.stored for chunk in missing)
        self._counts["prefetched"] += sum(chunk.announced for chunk in needed)
        self._move(victims, missing)
        self.engine.wait(needed)
        for chunk in needed:
            chunk.announced = False
        self._window.use(needed)

    def _fetch_ahead(self, missing: list[Chunk], protected: set[Chunk]) -> None:
        """Start to fetch the first of ``missing``, as many as find room."""
        while missing and (victims := self._window.victims(len(missing), protected)) is None:
            missing.pop()
        if missing:
            self._move(victims, missing)
            for chunk in missing:
                chunk.announced = chunk.stored

    def _move(self, out: list[Chunk], into: list[Chunk]) -> None:
        if not into:
            return
        self.engine.move(out, into)
        for chunk in out:
            chunk.stored = True
        self._window.expel(out)
        self._window.admit(into)
        self._counts["bytes_out"] += len(out) * self.engine.chunk_bytes
        self._counts["bytes_in"] += sum(chunk.stored for chunk in into) * self.engine.chunk_bytes
