"""The pager: hands out tensors, makes them resident for a while, fetches the next ones meanwhile."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch

from peftk.paging.engine import Engine, Memory, engine_for
from peftk.paging.window import Chunk, Stats, Window

MOST_CHUNK = 2 << 20  # bytes; unified memory migrates 2 MB at a time, and a chunk's bookkeeping costs some microseconds
CHUNKS_IN_BUDGET = 16  # at least, so that a small budget isn't one chunk

_pagers: weakref.WeakSet[Pager] = weakref.WeakSet()
_default_pagers: dict[tuple[torch.device, int | None], Pager] = {}


class Pager:
    """Allocates tensors whose memory may be paged out between two uses.

    ``device``: where the tensors are used, "cpu" or a CUDA device. ``budget``: bytes that may be resident at once; None leaves
    it to the system, which pages under memory pressure. ``folder``: where the page file goes, TMPDIR if None (CPU only);
    ``allow_tmpfs``: take a folder that lies in memory all the same.

    OSError, that says which folder and why, where no page file can be made there; ValueError for a bad argument.
    """

    def __init__(
        self,
        device: torch.device | str,
        budget: int | None = None,
        folder: str | os.PathLike | None = None,
        *,
        allow_tmpfs: bool = False,
    ) -> None:
        self.device = torch.device(device)
        if budget is not None and (not isinstance(budget, int) or budget <= 0):
            raise ValueError(f"budget={budget!r}: expected a positive number of bytes, or None")
        self.budget = budget
        self._engine: Engine = engine_for(self.device, folder, allow_tmpfs)
        share = MOST_CHUNK if budget is None else min(MOST_CHUNK, budget // CHUNKS_IN_BUDGET)
        self._chunk_bytes = max(share // self._engine.granule, 1) * self._engine.granule
        self._window = Window(budget)
        self._memories: dict[int, list[Chunk]] = {}
        self._counts = dict.fromkeys(("faults", "prefetched", "bytes_in", "bytes_out"), 0)
        self._lock = threading.RLock()
        self._owner = os.getpid()
        self._closed = False
        self._close_engine = weakref.finalize(self, self._engine.close)
        _pagers.add(self)

    def empty(self, shape: Sequence[int] | int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of zeros on the pager's device, contiguous; its memory is given back when it dies, or after ``close``.

        OSError where the disk (or the memory) has no room for it: the room is reserved here, a later write can't fail for it.
        """
        self._check_usable()
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        nbytes = math.prod(shape) * dtype.itemsize
        if not nbytes:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        memory = self._engine.allocate(nbytes)
        self._track(memory)
        return memory.tensor[:nbytes].view(dtype).view(shape)

    @contextlib.contextmanager
    def resident(self, tensors: Sequence[torch.Tensor], upcoming: Sequence[torch.Tensor] = ()) -> Iterator[list[torch.Tensor]]:
        """Inside the ``with`` these tensors are resident; those ``upcoming`` are fetched while the body runs, in that order, as
        far as the budget goes.

        Contiguous slices of the pager's tensors are taken too: a tensor larger than the budget is worked through in slices.
        Yields the tensors to work on, in the same order. ValueError for a tensor that is not this pager's, or where all of
        them together don't fit the budget; OSError where a page could not be written or read.
        """
        self._check_usable()
        with self._lock:
            needed = self._chunks_of(tensors, "tensors")
            self._bring(needed, wanted := self._chunks_of(upcoming, "upcoming"))
            for chunk in needed:
                chunk.in_use += 1
            self._prefetch([chunk for chunk in wanted if not chunk.resident], {*needed, *wanted})
        try:
            yield list(tensors)
        finally:
            with self._lock:
                for chunk in needed:
                    chunk.in_use -= 1
                self._engine.used(needed)

    def stats(self) -> Stats:
        """Of this pager."""
        with self._lock:
            held = self._window.held
            return Stats(held, self._window.total - held, **self._counts)

    def close(self) -> None:
        """Stop paging. Tensors that still live keep their memory and their values; the page file goes with the last of them."""
        with self._lock:
            self._closed = True
            self._close_engine()

    def __contains__(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lies in this pager's memory."""
        return tensor.untyped_storage().data_ptr() in self._memories

    def _check_usable(self) -> None:
        if os.getpid() != self._owner:
            raise RuntimeError(
                f"this pager belongs to process {self._owner}, this is {os.getpid()}: a fork has to make its own pager"
            )
        if self._closed:
            raise RuntimeError("this pager is closed")

    def _track(self, memory: Memory) -> None:
        chunks = [
            Chunk(memory.address + start, min(self._chunk_bytes, memory.nbytes - start))
            for start in range(0, memory.nbytes, self._chunk_bytes)
        ]
        with self._lock:
            self._memories[memory.address] = chunks
            self._window.total += memory.nbytes
        weakref.finalize(memory.owner, _forget, weakref.ref(self), memory.address).atexit = False

    def _forget(self, address: int) -> None:
        with self._lock:
            chunks = self._memories.pop(address)
            self._window.expel([chunk for chunk in chunks if chunk.resident])
            self._window.total -= sum(chunk.nbytes for chunk in chunks)

    def _chunks_of(self, tensors: Iterable[torch.Tensor], argument: str) -> list[Chunk]:
        """The chunks under the tensors, each once, in order of address within a tensor."""
        found: dict[Chunk, None] = {}
        for i, tensor in enumerate(tensors):
            if not tensor.numel():
                continue
            if (chunks := self._memories.get(base := tensor.untyped_storage().data_ptr())) is None:
                raise ValueError(f"{argument}[{i}], shape {tuple(tensor.shape)}: expected a tensor made by this pager's empty()")
            if not tensor.is_contiguous():
                raise ValueError(f"{argument}[{i}]: expected a contiguous tensor, got strides {tensor.stride()}")
            start = tensor.data_ptr() - base
            first, last = start // self._chunk_bytes, (start + tensor.nbytes - 1) // self._chunk_bytes
            found.update(dict.fromkeys(chunks[first : last + 1]))
        return list(found)

    def _bring(self, needed: list[Chunk], wanted: list[Chunk]) -> None:
        """Make ``needed`` resident and wait for it."""
        missing = [chunk for chunk in needed if not chunk.resident]
        protected = {*needed, *wanted}
        bytes_missing = sum(chunk.nbytes for chunk in missing)
        victims = self._window.victims(bytes_missing, protected)
        if victims is None:  # what was fetched ahead gives way to what is needed
            victims = self._window.victims(bytes_missing, set(needed))
        if victims is None:
            total = sum(chunk.nbytes for chunk in needed)
            raise ValueError(
                f"tensors take {total} bytes of whole chunks at once, budget is {self.budget}: pass fewer, or slices"
            )
        self._counts["faults"] += sum(chunk.stored for chunk in missing)
        self._counts["prefetched"] += sum(chunk.arrival is not None and chunk.stored for chunk in needed)
        self._move(victims, missing)
        self._engine.wait({id(chunk.arrival): chunk.arrival for chunk in needed if chunk.arrival is not None}.values())
        for chunk in needed:
            chunk.arrival = None
        self._window.use(needed)

    def _prefetch(self, missing: list[Chunk], protected: set[Chunk]) -> None:
        """Start to fetch the first of ``missing`` that find room."""
        while missing and (victims := self._window.victims(sum(c.nbytes for c in missing), protected)) is None:
            missing = missing[: len(missing) // 2]
        if missing:
            self._move(victims, missing)

    def _move(self, out: list[Chunk], into: list[Chunk]) -> None:
        if not out and not into:
            return
        handle = self._engine.move(out, into)
        self._window.expel(out)
        self._window.admit(into)
        self._counts["bytes_out"] += sum(chunk.nbytes for chunk in out)
        self._counts["bytes_in"] += sum(chunk.nbytes for chunk in into if chunk.stored)
        for chunk in out:
            chunk.stored = True
            chunk.arrival = None
        for chunk in into:
            chunk.arrival = handle


def _forget(pager: weakref.ref[Pager], address: int) -> None:
    if (alive := pager()) is not None:
        alive._forget(address)


def empty(shape: Sequence[int] | int, dtype: torch.dtype, device: torch.device | str, budget: int | None = None) -> torch.Tensor:
    """A tensor of zeros from the default pager of this device and budget (bytes, shared by all tensors made with it)."""
    key = (torch.device(device), budget)
    if (pager := _default_pagers.get(key)) is None or pager._owner != os.getpid():
        pager = _default_pagers[key] = Pager(device, budget)
    return pager.empty(shape, dtype)


def resident(
    tensors: Sequence[torch.Tensor], upcoming: Sequence[torch.Tensor] = ()
) -> contextlib.AbstractContextManager[list[torch.Tensor]]:
    """``Pager.resident`` of the pager that made the first tensor. ValueError where none did."""
    for pager in _pagers:
        if tensors and tensors[0] in pager:
            return pager.resident(tensors, upcoming)
    raise ValueError("tensors: expected at least one tensor, made by peftk.paging.empty or a Pager")


def stats() -> Stats:
    """Of all living pagers of this process, added up."""
    return sum((pager.stats() for pager in list(_pagers)), Stats())
