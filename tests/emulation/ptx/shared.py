"""Shared memory of a batch of blocks, with what each byte went through: written, read, in flight.

Bytes are watched in granules: the smallest access of the kernel, so that every access covers whole granules. A stamp is one
int64: the time of the access (State.now), flags, the thread's number in its block. Stamps order as times do, which makes the
common case (everything before the thread's last barrier) a single comparison. Who waits is ordered after all that came before:
for a barrier of some warps, or a mask of some lanes, this takes those who didn't take part as ordered too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .faults import InFlight, Misaligned, OutOfBounds, Race, UninitialisedShared
from .memory import Lanes, lane_of
from .types import UNSIGNED

if TYPE_CHECKING:
    from .counts import Traffic
    from .state import State

TIME = 20  # bits below the time
THREAD = (1 << 12) - 1
ATOMIC = 1 << 12
SEVERAL_OF_WARP = 1 << 13  # the last access was one of several threads of this thread's warp
SEVERAL = 1 << 14  # of several warps
NEVER_ORDERED = 1 << 42  # the time of a copy in flight


@dataclass
class Copy:
    """One cp.async instruction's copies that have not landed: of these lanes, at these indices, belonging to these groups."""

    lanes: np.ndarray
    index: np.ndarray
    values: np.ndarray
    group: np.ndarray
    size: int


class SharedMemory:
    """``nbytes`` for each block. Addresses count from the block's first byte."""

    def __init__(self, blocks: int, nbytes: int, granule: int, lanes: int, traffic: Traffic | None = None):
        self.nbytes, self.granule, self.traffic = nbytes, granule, traffic
        self.stride = -(-max(nbytes, 1) // 16) * 16
        self.bytes = np.zeros(blocks * self.stride, np.uint8)
        self.views = {size: self.bytes.view(dtype) for size, dtype in UNSIGNED.items()}
        self.written = np.zeros(blocks * self.stride // granule, np.int64)
        self.read = np.zeros(blocks * self.stride // granule, np.int64)
        self.in_flight: list[Copy] = []
        self.open_group = np.zeros(lanes, np.int64)

    # ---- accesses -------------------------------------------------------------------------------------------------------------

    def load(self, s: State, lanes: Lanes, address: np.ndarray, size: int) -> np.ndarray:
        """``size`` bytes (1, 2, 4, 8, 16) at each address, as bits."""
        start = self.starts(s, lanes, address, size)
        for granule in self.granules(start, size):
            self.check_read(s, lanes, granule)
        return self.views[size].take(start >> (size.bit_length() - 1))

    def store(self, s: State, lanes: Lanes, address: np.ndarray, values: np.ndarray, size: int) -> None:
        """Bits to each address. Two threads may write the same value."""
        start = self.starts(s, lanes, address, size)
        index = start >> (size.bit_length() - 1)
        view = self.views[size]
        for granule in self.granules(start, size):
            suspects = self.check_write(s, lanes, granule, 0)
            if len(suspects):
                other = np.broadcast_to(values, index.shape)[suspects].tobytes() != view[index[suspects]].tobytes()
                if other:
                    self.race(s, lanes, granule, suspects[0], self.written, "writes what {other} wrote")
        view[index] = values
        for granule in self.granules(start, size):
            self.stamp_writes(s, lanes, granule, view, index, values)

    def atomic(self, s: State, lanes: Lanes, address: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The view and the indices to work on; atomics don't race with one another."""
        start = self.starts(s, lanes, address, size)
        for granule in self.granules(start, size):
            self.check_initialised(s, lanes, granule)
            suspects = self.check_write(s, lanes, granule, ATOMIC)
            if len(suspects):
                self.race(s, lanes, granule, suspects[0], self.written, "updates what {other} wrote")
            self.written[granule] = self.stamp(s, lanes) | ATOMIC
        return self.views[size], start >> (size.bit_length() - 1)

    def starts(self, s: State, lanes: Lanes, address: np.ndarray, size: int) -> np.ndarray:
        """Each access's first byte in ``bytes``."""
        if int(address.max()) + size > self.nbytes:
            at = int(address.argmax())
            detail = f"{size} bytes at shared address {int(address[at]):#x} of {self.nbytes} bytes"
            raise OutOfBounds(detail, lane_of(lanes, at))
        offset = address.astype(np.int64)
        if int(np.bitwise_or.reduce(offset)) & (size - 1):
            at = int(np.flatnonzero(offset & (size - 1))[0])
            raise Misaligned(f"{size} bytes at shared address {int(offset[at]):#x}, no multiple of {size}", lane_of(lanes, at))
        if self.traffic:
            self.traffic.shared_access(lanes, offset, size)
        return offset + (s.block if lanes is None else s.block[lanes]) * self.stride

    def granules(self, start: np.ndarray, size: int) -> list[np.ndarray]:
        """The first granule of each access, the second of each, …"""
        first = start >> (self.granule.bit_length() - 1)
        return [first + n if n else first for n in range(size // self.granule)]

    # ---- order ----------------------------------------------------------------------------------------------------------------

    def stamp(self, s: State, lanes: Lanes) -> np.ndarray:
        """Now, by these lanes."""
        return (s.thread if lanes is None else s.thread[lanes]) | (s.now << TIME)

    def check_read(self, s: State, lanes: Lanes, granule: np.ndarray) -> None:
        """Written by somebody whose write is ordered before; then the read is noted."""
        written = self.written.take(granule)
        barrier = s.last_barrier if lanes is None else s.last_barrier[lanes]
        # An unwritten granule's stamp is 0; minus 1 it is the largest unsigned number and fails the one comparison.
        ordered = (written - 1).view(np.uint64) < (barrier << TIME).view(np.uint64)
        if not ordered.all():
            self.check_initialised(s, lanes, granule)
            suspects = self.unordered(s, lanes, written, np.flatnonzero(~ordered))
            if len(suspects):
                self.race(s, lanes, granule, suspects[0], self.written, "reads what {other} wrote")
        self.note_read(s, lanes, granule)

    def check_initialised(self, s: State, lanes: Lanes, granule: np.ndarray) -> None:
        unwritten = self.written.take(granule) == 0
        if unwritten.any():
            at = int(np.flatnonzero(unwritten)[0])
            raise UninitialisedShared(
                f"shared address {self.address(s, lanes, granule, at):#x} was never written", lane_of(lanes, at)
            )

    def unordered(self, s: State, lanes: Lanes, stamps: np.ndarray, suspects: np.ndarray) -> np.ndarray:
        """Of the suspect positions, those whose last access is another thread's and ordered by nothing."""
        lane = suspects if lanes is None else lanes[suspects]
        stamp = stamps[suspects]
        time, thread = stamp >> TIME, stamp & THREAD
        mine = s.thread[lane]
        alone = (stamp & (SEVERAL | SEVERAL_OF_WARP)) == 0
        same_warp = ((thread >> 5) == (mine >> 5)) & ((stamp & SEVERAL) == 0)
        ordered = (time < s.last_barrier[lane]) | (same_warp & (time < s.last_sync[lane])) | (alone & (thread == mine))
        flying = time >= NEVER_ORDERED
        if flying.any():
            at = suspects[np.flatnonzero(flying)[0]]
            raise InFlight("a cp.async is still filling these shared bytes: no wait came before", lane_of(lanes, int(at)))
        return suspects[~ordered]

    def note_read(self, s: State, lanes: Lanes, granule: np.ndarray) -> None:
        """The last reader of each granule, or that there are several whom nothing has ordered yet."""
        before = self.read.take(granule)
        barrier = s.last_barrier if lanes is None else s.last_barrier[lanes]
        if (((before & SEVERAL) != 0) & (before >= (barrier << TIME))).all():
            return  # no more can become known
        stamp = self.stamp(s, lanes)
        self.read[granule] = stamp
        now = self.read.take(granule)
        # Unordered earlier readers stay known, and so do the others of this very instruction.
        joined = np.flatnonzero((before >= (barrier << TIME)) | (now != stamp))
        if len(joined):
            lane = joined if lanes is None else lanes[joined]
            mine, place = s.thread[lane], granule[joined]
            several = np.zeros(len(joined), np.bool_)
            foreign = np.zeros(len(joined), np.bool_)
            for other, is_now in ((before[joined], False), (now[joined], True)):
                of_other_warp = ((other & THREAD) >> 5 != mine >> 5) | ((other & SEVERAL) != 0)
                since = np.where(of_other_warp, s.last_barrier[lane], s.last_sync[lane]) << TIME
                unordered = other != stamp[joined] if is_now else other >= since
                foreign |= unordered & of_other_warp
                several |= unordered & (((other & THREAD) != mine) | ((other & SEVERAL_OF_WARP) != 0))
            self.read[place[several]] = stamp[joined][several] | SEVERAL_OF_WARP
            self.read[place[foreign]] = stamp[joined][foreign] | SEVERAL

    def check_write(self, s: State, lanes: Lanes, granule: np.ndarray, kind: int) -> np.ndarray:
        """Positions whose granule another thread wrote unordered, for the caller to judge; a fault where one only read it."""
        barrier = (s.last_barrier if lanes is None else s.last_barrier[lanes]) << TIME
        read = self.read.take(granule)
        late = read >= barrier
        if late.any():
            suspects = self.unordered(s, lanes, read, np.flatnonzero(late))
            if len(suspects):
                self.race(s, lanes, granule, suspects[0], self.read, "writes what {other} reads")
        written = self.written.take(granule)
        late = written >= barrier
        if kind == ATOMIC:
            late &= (written & ATOMIC) == 0
        return self.unordered(s, lanes, written, np.flatnonzero(late)) if late.any() else np.empty(0, np.int64)

    def stamp_writes(
        self, s: State, lanes: Lanes, granule: np.ndarray, view: np.ndarray, index: np.ndarray, values: np.ndarray
    ) -> None:
        """Notes the writers; threads of one instruction that wrote to one place must have written one value."""
        stamp = self.stamp(s, lanes)
        self.written[granule] = stamp
        now = self.written.take(granule)
        lost = np.flatnonzero(now != stamp)
        if len(lost):
            if np.broadcast_to(values, index.shape)[lost].tobytes() != view[index[lost]].tobytes():
                self.race(s, lanes, granule, lost[0], self.written, "writes another value than {other}")
            foreign = ((now[lost] & THREAD) >> 5) != (stamp[lost] & THREAD) >> 5
            self.written[granule[lost]] |= SEVERAL_OF_WARP
            self.written[granule[lost[foreign]]] |= SEVERAL

    def race(self, s: State, lanes: Lanes, granule: np.ndarray, at: int, stamps: np.ndarray, what: str) -> None:
        """Raises the fault for the access at a position."""
        other = f"thread {int(stamps[granule[at]] & THREAD)} of the block"
        detail = (
            f"{what.format(other=other)} at shared address {self.address(s, lanes, granule, int(at)):#x}, with no barrier between"
        )
        raise Race(detail, lane_of(lanes, int(at)))

    def address(self, s: State, lanes: Lanes, granule: np.ndarray, at: int) -> int:
        return int(granule[at]) * self.granule - int(s.block[lane_of(lanes, at)]) * self.stride

    # ---- cp.async -------------------------------------------------------------------------------------------------------------

    def copy_async(self, s: State, lanes: Lanes, address: np.ndarray, values: np.ndarray, size: int) -> None:
        """The bytes appear when the lanes wait for their group; until then nobody may touch the place."""
        start = self.starts(s, lanes, address, size)
        numbers = s.numbers(lanes)
        for granule in self.granules(start, size):
            suspects = self.check_write(s, lanes, granule, 0)
            if len(suspects):
                self.race(s, lanes, granule, suspects[0], self.written, "copies to what {other} wrote")
            stamp = s.thread[numbers] | (NEVER_ORDERED << TIME)
            self.written[granule] = stamp
            lost = np.flatnonzero(self.written.take(granule) != stamp)
            if len(lost):
                self.race(s, lanes, granule, lost[0], self.written, "copies to the same place as {other}")
        index = start >> (size.bit_length() - 1)
        self.in_flight.append(Copy(numbers, index, values, self.open_group[numbers], size))

    def commit(self, s: State, lanes: Lanes) -> None:
        """Closes the lanes' open group."""
        self.open_group[s.numbers(lanes)] += 1

    def wait(self, s: State, lanes: Lanes, newest: int | None) -> None:
        """Lands every group of the lanes but the ``newest`` closed ones; None: the open group as well."""
        waits = np.zeros(s.lanes, np.bool_)
        waits[s.numbers(lanes)] = True
        remaining = []
        for copy in self.in_flight:
            landed = waits[copy.lanes]
            if newest is not None:
                landed &= copy.group < self.open_group[copy.lanes] - newest
            if landed.any():
                self.land(s, copy, landed)
            if not landed.all():
                left = ~landed
                remaining.append(Copy(copy.lanes[left], copy.index[left], copy.values[left], copy.group[left], copy.size))
        self.in_flight = remaining

    def land(self, s: State, copy: Copy, which: np.ndarray) -> None:
        lanes, index = copy.lanes[which], copy.index[which]
        self.views[copy.size][index] = copy.values[which]
        for granule in self.granules(index * copy.size, copy.size):
            self.written[granule] = self.stamp(s, lanes)
