"""Global memory: real host addresses, but only those that were allowed."""

from __future__ import annotations

import bisect
import ctypes
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .faults import Misaligned, OutOfBounds
from .types import UNSIGNED

if TYPE_CHECKING:
    from .counts import Traffic
    from .writers import Writers

Lanes = np.ndarray | None  # lane numbers of a batch, ascending; None: every lane


@dataclass
class Segment:
    """Bytes that may be read, or written, in one piece; ranges that overlap are one segment, ranges that touch are two."""

    start: int
    end: int
    name: str
    views: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)

    def view(self, size: int) -> tuple[int, np.ndarray]:
        """The first address on a multiple of size, and every whole element behind it."""
        if size not in self.views:
            first = -(-self.start // size) * size
            count = max(0, (self.end - first) // size)
            raw = (ctypes.c_uint8 * (count * size)).from_address(first)
            self.views[size] = (first, np.frombuffer(raw, UNSIGNED[size]))
        return self.views[size]


@dataclass(frozen=True)
class Range:
    """What was allowed, as it was allowed."""

    address: int
    nbytes: int
    name: str
    writable: bool


class Memory:
    """The host's bytes that a kernel may touch."""

    def __init__(self) -> None:
        self.ranges: list[Range] = []

    def allow(self, address: int, nbytes: int, name: str, writable: bool = True) -> None:
        """``nbytes`` from ``address`` on may be read, and written where ``writable``. Whoever allows them keeps them alive."""
        if address < 0 or nbytes < 0:
            raise ValueError(f"{name}: address {address:#x} and nbytes {nbytes} must not be negative")
        self.ranges.append(Range(address, nbytes, name, writable))


class AddressSpace:
    """The ranges of one launch, ready for gathers and scatters of many lanes."""

    def __init__(self, ranges: list[Range]):
        self.ranges = ranges
        self.readable = Segments(ranges)
        self.writable = Segments([r for r in ranges if r.writable])
        self.traffic: Traffic | None = None
        self.writers: Writers | None = None

    def load(self, lanes: Lanes, address: np.ndarray, size: int) -> np.ndarray:
        """``size`` bytes (1, 2, 4, 8, 16) at each address (uint64), as bits."""
        segments = self.readable
        if self.traffic:
            self.traffic.global_access(lanes, address, size)
        if found := segments.one(address, size):
            first, view = found.view(size)
            self.check_alignment(lanes, address, size)
            return view.take(index_of(address, first, size))
        which = self.which(segments, lanes, address, size, "read")
        values = np.empty(address.shape, UNSIGNED[size])
        for number in np.unique(which):
            chosen = which == number
            first, view = segments.items[number].view(size)
            values[chosen] = view[index_of(address[chosen], first, size)]
        return values

    def store(self, lanes: Lanes, address: np.ndarray, values: np.ndarray, size: int) -> None:
        """The last lane wins where two write to one address."""
        values = np.broadcast_to(values, address.shape)
        if self.writers:
            self.check_writers(lanes, address, values, size)
        for view, chosen, index in self.places(lanes, address, size):
            view[index] = values if chosen is None else values[chosen]

    def check_writers(self, lanes: Lanes, address: np.ndarray, values: np.ndarray, size: int) -> None:
        """That no other thread stored something else there."""
        which = self.which(self.writable, lanes, address, size, "written")
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)
        for number in np.unique(which):
            here = np.flatnonzero(which == number)
            numbers = here if lanes is None else lanes[here]
            self.writers.check(self, numbers, self.writable.items[number], address[here], raw[here])

    def places(self, lanes: Lanes, address: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray | None, np.ndarray]]:
        """Writable views with the positions in ``address`` that lie in them (None: all) and their indices there."""
        segments = self.writable
        if self.traffic:
            self.traffic.global_access(lanes, address, size)
        if found := segments.one(address, size):
            first, view = found.view(size)
            self.check_alignment(lanes, address, size)
            return [(view, None, index_of(address, first, size))]
        which = self.which(segments, lanes, address, size, "written")
        parts = []
        for number in np.unique(which):
            chosen = np.flatnonzero(which == number)
            first, view = segments.items[number].view(size)
            parts.append((view, chosen, index_of(address[chosen], first, size)))
        return parts

    def check_alignment(self, lanes: Lanes, address: np.ndarray, size: int) -> None:
        if size > 1 and int(np.bitwise_or.reduce(address)) & (size - 1):
            at = int(np.flatnonzero(address & np.uint64(size - 1))[0])
            detail = f"{size} bytes at {int(address[at]):#x}, which is no multiple of {size}, {self.near(int(address[at]), size)}"
            raise Misaligned(detail, lane_of(lanes, at))

    def which(self, segments: Segments, lanes: Lanes, address: np.ndarray, size: int, verb: str) -> np.ndarray:
        """The number of the segment that each access lies in; a fault where one lies in none."""
        number = np.searchsorted(segments.starts, address, side="right") - 1
        ends = segments.ends[number] if segments.items else np.zeros(address.shape, np.uint64)
        outside = (number < 0) | (address > ends - np.uint64(size)) | (ends < np.uint64(size))
        if outside.any():
            at = int(np.flatnonzero(outside)[0])
            place = int(address[at])
            detail = f"{size} bytes at {place:#x} must not be {verb}: {self.near(place, size)}"
            raise OutOfBounds(detail, lane_of(lanes, at))
        self.check_alignment(lanes, address, size)
        return number

    def near(self, address: int, size: int) -> str:
        """Where an address lies, told from the nearest range."""
        if not self.ranges:
            return "no range is allowed"
        nearest = min(self.ranges, key=lambda r: max(r.address - address, address + size - (r.address + r.nbytes), 0))
        start, end = nearest.address, nearest.address + nearest.nbytes
        kind = "" if nearest.writable else ", read-only"
        if address < start:
            return f"{start - address} bytes before '{nearest.name}' ({nearest.nbytes} bytes{kind})"
        if address + size > end:
            return f"{address - start} bytes into '{nearest.name}' ({nearest.nbytes} bytes{kind})"
        return f"inside '{nearest.name}' at byte {address - start} of {nearest.nbytes}{kind}"


class Segments:
    """Ascending and disjoint."""

    def __init__(self, ranges: list[Range]):
        self.items: list[Segment] = []
        for r in sorted((r for r in ranges if r.nbytes), key=lambda r: r.address):
            if self.items and r.address < self.items[-1].end:
                last = self.items[-1]
                last.end = max(last.end, r.address + r.nbytes)
            else:
                self.items.append(Segment(r.address, r.address + r.nbytes, r.name))
        self.first = [s.start for s in self.items]
        self.starts = np.array(self.first, np.uint64)
        self.ends = np.array([s.end for s in self.items], np.uint64)

    def one(self, address: np.ndarray, size: int) -> Segment | None:
        """The segment that holds every access, where one does."""
        lowest = int(address.min())
        number = bisect.bisect_right(self.first, lowest) - 1
        if number >= 0 and int(address.max()) + size <= self.items[number].end:
            return self.items[number]
        return None


def index_of(address: np.ndarray, first: int, size: int) -> np.ndarray:
    """Elements of ``size`` bytes between an address and the view's first."""
    index = (address - np.uint64(first)).view(np.int64)
    return index if size == 1 else index >> (size.bit_length() - 1)


def lane_of(lanes: Lanes, position: int) -> int:
    """The lane that stands at a position of a batch's active lanes."""
    return position if lanes is None else int(lanes[position])
