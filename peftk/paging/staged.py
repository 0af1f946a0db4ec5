"""Paging to a GPU that can't share managed memory with the host (Windows, WSL): pinned memory and two buffers on the GPU.

A tensor's home is pinned host memory, which the GPU reaches over the bus at any time. While tensors are resident, copies of them
lie in one buffer, and the caller works on those; the next ones are copied to the other buffer by a side stream meanwhile.
Copies go home on the caller's own stream, so that whatever it does next finds them there.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import torch

from peftk.paging.driver import OUT_OF_MEMORY, Block, Driver, DriverError, Event
from peftk.paging.engine import Stats, check_tensor
from peftk.paging.tensors import tensor_over

ALIGNMENT = 512  # bytes, of a tensor in a buffer


class _Buffer:
    """One of the two: GPU memory, and whose copies it holds."""

    def __init__(self) -> None:
        self.block: Block | None = None
        self.nbytes = 0
        self.holds: tuple[tuple[int, int], ...] = ()  # (address, bytes) of the homes
        self.in_use = False
        self.arrived: Event | None = None
        self.left: Event | None = None


class StagedStore:
    """See ``peftk.paging.engine.Store``; arguments as of UnifiedMemory. ``budget``: bytes of both buffers together."""

    def __init__(self, driver: Driver, budget: int | None, current_stream: Callable[[], int], device: torch.device) -> None:
        self._driver, self._device, self._current_stream = driver, device, current_stream
        self._most = None if budget is None else budget // 2
        with driver.context():
            self._inward = driver.stream()
        weakref.finalize(self, driver.call, "cuStreamDestroy_v2", self._inward).atexit = False
        self._buffers = (_Buffer(), _Buffer())
        self._homes: dict[int, tuple[int, weakref.ref]] = {}  # address: (bytes, the block)
        self._dead: deque[int] = deque()  # finalisers run on any thread: they only leave a note
        self._last: Event | None = None  # after the last copies home
        self._counts = dict.fromkeys(("faults", "prefetched", "bytes_in", "bytes_out"), 0)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """MemoryError where the system has no pinned memory left."""
        nbytes = math.prod(shape) * dtype.itemsize
        with self._driver.context():
            try:
                host, address = self._driver.pinned(nbytes)
            except DriverError as error:
                if error.code != OUT_OF_MEMORY:
                    raise
                raise MemoryError(f"no {nbytes} bytes of pinned memory: {error}") from error
        ctypes.memset(host, 0, nbytes)
        block = Block(self._driver, host, "cuMemFreeHost")
        self._bury()
        self._homes[address] = (nbytes, weakref.ref(block))
        weakref.finalize(block, self._dead.append, address).atexit = False
        return tensor_over(block, address, shape, dtype, self._device)

    def check_room(self, nbytes: int) -> None:
        """The host's memory tells when it is taken."""

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        return self._most is None or _room(self._ranges(tensors, "tensors")) <= self._most

    def enter(self, tensors: Sequence[torch.Tensor], upcoming: Sequence[torch.Tensor]) -> tuple[_Buffer, list[torch.Tensor]]:
        self._bury()
        needed, wanted = self._ranges(tensors, "tensors"), self._ranges(upcoming, "upcoming")
        if (nbytes := _room(needed)) > (self._most or nbytes):
            raise ValueError(f"tensors take {nbytes} bytes, they may take half the budget, {self._most}: pass fewer or slices")
        with self._driver.context():
            buffer = self._bring(needed)
            if wanted and not _overlap(needed, wanted) and _room(wanted) <= (self._most or _room(wanted)):
                self._fetch_ahead(wanted)
        here, offset = [], 0
        for tensor in tensors:
            here.append(tensor_over(buffer.block, buffer.block.address + offset, tuple(tensor.shape), tensor.dtype, self._device))
            offset += _aligned(tensor.nbytes)
        return buffer, here

    def leave(self, mark: _Buffer) -> None:
        """Copies home on the caller's stream; a copy of the same bytes that was fetched ahead is out of date now."""
        stream, offset, changed = self._current_stream(), 0, mark.holds
        with self._driver.context():
            for address, nbytes in changed:
                self._driver.call("cuMemcpyAsync", address, mark.block.address + offset, nbytes, stream)
                offset += _aligned(nbytes)
            self._last = self._driver.record(stream)
        self._counts["bytes_out"] += sum(nbytes for _, nbytes in changed)
        for buffer in self._buffers:
            if buffer is mark or _overlap(buffer.holds, changed):
                buffer.holds = ()
        mark.in_use = False

    def holds(self, tensor: torch.Tensor) -> bool:
        self._bury()
        return tensor.untyped_storage().data_ptr() in self._homes

    def stats(self) -> Stats:
        self._bury()
        held = sum(nbytes for buffer in self._buffers for _, nbytes in buffer.holds)
        return Stats(held, sum(nbytes for nbytes, _ in self._homes.values()) - held, **self._counts)

    def close(self) -> None:
        """Nothing to do: the stream goes with this object, memory with its tensors."""

    def _bury(self) -> None:
        while self._dead:
            address = self._dead.popleft()
            if address in self._homes and self._homes[address][1]() is None:
                del self._homes[address]

    def _ranges(self, tensors: Sequence[torch.Tensor], argument: str) -> tuple[tuple[int, int], ...]:
        for i, tensor in enumerate(tensors):
            check_tensor(tensor, not tensor.numel() or self.holds(tensor), f"{argument}[{i}]")
        return tuple((tensor.data_ptr(), tensor.nbytes) for tensor in tensors)

    def _bring(self, needed: tuple[tuple[int, int], ...]) -> _Buffer:
        """The buffer that holds the copies; the current stream waits for them."""
        buffer = next((b for b in self._buffers if b.holds == needed and not b.in_use), None)
        self._counts["faults" if buffer is None else "prefetched"] += len(needed)
        if buffer is None:
            buffer = next((b for b in self._buffers if not b.in_use), None)
            if buffer is None:
                raise RuntimeError("both buffers of this pager are in use: leave one `resident` before a third")
            self._copy_in(buffer, needed)
        buffer.in_use = True
        self._driver.stream_waits(self._current_stream(), buffer.arrived)
        return buffer

    def _fetch_ahead(self, wanted: tuple[tuple[int, int], ...]) -> None:
        buffer = next((b for b in self._buffers if not b.in_use), None)
        if buffer is not None and buffer.holds != wanted:
            self._copy_in(buffer, wanted)

    def _copy_in(self, buffer: _Buffer, ranges: tuple[tuple[int, int], ...]) -> None:
        """On the side stream, after the last copies home: the buffer is free then, and the homes are up to date."""
        buffer.holds = ()
        if (room := max(_room(ranges), ALIGNMENT)) > buffer.nbytes:
            buffer.block = None
            buffer.block, buffer.nbytes = Block(self._driver, self._driver.on_device(room)), room
        if self._last is not None:
            self._driver.stream_waits(self._inward, self._last)
        offset = 0
        for address, nbytes in ranges:
            self._driver.call("cuMemcpyAsync", buffer.block.address + offset, address, nbytes, self._inward)
            offset += _aligned(nbytes)
        buffer.arrived = self._driver.record(self._inward)
        buffer.holds = ranges
        self._counts["bytes_in"] += sum(nbytes for _, nbytes in ranges)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _room(ranges: Sequence[tuple[int, int]]) -> int:
    """Bytes that the ranges take in a buffer."""
    return sum(_aligned(nbytes) for _, nbytes in ranges)


def _overlap(some: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> bool:
    return any(a < d + m and d < a + n for a, n in some for d, m in others)
