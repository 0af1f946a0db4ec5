"""Paging on a GPU: managed memory whose home is the host, brought to the GPU chunk by chunk and sent back.

Two side streams, one each way, run beside the caller's: a chunk comes in while the work before it runs, and leaves after the
event of the work that used it last. The host never waits. Where the driver refuses an advice or a prefetch, the GPU reads the
host's memory over the bus: slower, and right.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from peftk.paging.chunked import ChunkedStore
from peftk.paging.driver import (
    ACCESSED_BY,
    HOST,
    OUT_OF_MEMORY,
    PREFERRED_LOCATION,
    REFUSALS,
    Block,
    Driver,
    DriverError,
    Event,
    installed_driver,
)
from peftk.paging.engine import Memory, Store
from peftk.paging.staged import StagedStore
from peftk.paging.tensors import tensor_over
from peftk.paging.window import Chunk

CHUNKS_IN_BUDGET = 16  # at least, so that a small budget isn't one chunk
MOST_CHUNK, LEAST_CHUNK = 2 << 20, 64 << 10  # bytes: what one prefetch migrates at once, and the size of a GPU's small page

log = logging.getLogger("peftk")


class UnifiedMemory:
    """The engine; see ``peftk.paging.engine.Engine``.

    ``index``: the GPU's number. ``current_stream``: the stream the caller's work goes to now. ``device``: of the tensors.
    """

    def __init__(
        self, driver: Driver, index: int, budget: int | None, current_stream: Callable[[], int], device: torch.device
    ) -> None:
        most = MOST_CHUNK if budget is None else min(MOST_CHUNK, budget // CHUNKS_IN_BUDGET)
        self.chunk_bytes = max(most // LEAST_CHUNK, 1) * LEAST_CHUNK
        self._driver, self._index, self._device = driver, index, device
        self._current_stream = current_stream
        self._refused: set[str] = set()
        with driver.context():
            self._inward, self._outward = driver.stream(), driver.stream()
        for stream in (self._inward, self._outward):
            weakref.finalize(self, driver.call, "cuStreamDestroy_v2", stream).atexit = False

    def allocate(self, nbytes: int) -> Memory:
        """MemoryError where the driver has none."""
        with self._driver.context():
            try:
                address = self._driver.managed(nbytes)
            except DriverError as error:
                if error.code != OUT_OF_MEMORY:
                    raise
                raise MemoryError(f"no {nbytes} bytes of managed memory: {error}") from error
            owner = Block(self._driver, address)
            self._or_go_without("advice", lambda: self._driver.advise(address, nbytes, PREFERRED_LOCATION, HOST))
            self._or_go_without("advice", lambda: self._driver.advise(address, nbytes, ACCESSED_BY, self._index))
            self._driver.call("cuMemsetD8Async", address, 0, nbytes, self._current_stream())
        return Memory(address, 0, owner)

    def check_room(self, nbytes: int) -> None:
        """The host's memory tells when it is taken."""

    def tensor(self, owner: Any, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return tensor_over(owner, address, shape, dtype, self._device)

    def move(self, out: Sequence[Chunk], into: Sequence[Chunk]) -> None:
        spare = len(into) - len(out)
        with self._driver.context():
            if out:
                self._after(self._outward, [e for chunk in out for e in (chunk.release, chunk.moving)])
                self._prefetch(out, HOST, self._outward)
                left = self._driver.record(self._outward)
            self._after(self._inward, [chunk.moving for chunk in into])
            self._prefetch(into[:spare], self._index, self._inward)
            if out:
                self._after(self._inward, [left])
                self._prefetch(into[spare:], self._index, self._inward)
            arrived = self._driver.record(self._inward)
        for chunk in out:
            chunk.moving, chunk.release = left, None
        for chunk in into:
            chunk.moving = arrived

    def wait(self, chunks: Sequence[Chunk]) -> None:
        with self._driver.context():
            self._after(self._current_stream(), [chunk.moving for chunk in chunks])
        for chunk in chunks:
            chunk.moving = None

    def used(self, chunks: Sequence[Chunk]) -> None:
        with self._driver.context():
            event = self._driver.record(self._current_stream())
        for chunk in chunks:
            chunk.release = event

    def close(self) -> None:
        """Nothing to do: streams go with this object, memory with its tensors."""

    def _after(self, stream: int, events: list[Event | None]) -> None:
        """What is put on the stream from now on waits for each of the events."""
        for event in dict.fromkeys(event for event in events if event is not None):
            self._driver.stream_waits(stream, event)

    def _prefetch(self, chunks: Sequence[Chunk], device: int, stream: int) -> None:
        for address, nbytes in runs(chunks, self.chunk_bytes):
            self._or_go_without("prefetch", lambda a=address, n=nbytes: self._driver.prefetch(a, n, device, stream))

    def _or_go_without(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except DriverError as error:
            if error.code not in REFUSALS:
                raise
            if what not in self._refused:
                self._refused.add(what)
                log.warning("paging goes on without %s, more slowly: %s", what, error)


def runs(chunks: Sequence[Chunk], size: int) -> Iterator[tuple[int, int]]:
    """(address, bytes) of chunks of ``size`` bytes; neighbours of the same memory, one after the other, are joined."""
    first = nbytes = 0
    last = None
    for chunk in chunks:
        if last is not None and chunk.address == first + nbytes and chunk.owner is last.owner:
            nbytes += size
        else:
            if last is not None:
                yield first, nbytes
            first, nbytes = chunk.address, size
        last = chunk
    if last is not None:
        yield first, nbytes


def store_on(device: torch.device, budget: int | None) -> Store:
    """Unified memory, or pinned double buffers where host and GPU can't use that at once. RuntimeError without a GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError(f"device={str(device)!r}: torch {torch.__version__} sees no GPU: use 'cpu'")
    index = device.index if device.index is not None else torch.cuda.current_device()
    device = torch.device("cuda", index)
    return store_over(installed_driver(index), index, budget, lambda: torch.cuda.current_stream(device).cuda_stream, device)


def store_over(driver: Driver, index: int, budget: int | None, current_stream: Callable[[], int], device: torch.device) -> Store:
    """The same over a driver that the caller chose; see UnifiedMemory."""
    if driver.has_concurrent_access(index):
        return ChunkedStore(UnifiedMemory(driver, index, budget, current_stream, device), budget)
    return StagedStore(driver, budget, current_stream, device)
