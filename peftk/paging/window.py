"""What is resident, and what leaves first: a window of chunks under a byte budget. No memory is moved here."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stats:
    """Counts since the pagers were made (bytes, chunks) and what lies where now (bytes)."""

    resident: int = 0  # bytes in memory (of the device), by the pager's own account
    paged_out: int = 0  # bytes that lie in the file or, paged from a GPU, on the host
    faults: int = 0  # chunks that were needed and had to be waited for, as nobody had announced them
    prefetched: int = 0  # chunks that were needed and had been fetched ahead
    bytes_in: int = 0
    bytes_out: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the chunks brought in that had been announced; 1.0 where none had to be."""
        brought = self.prefetched + self.faults
        return self.prefetched / brought if brought else 1.0

    def __add__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(eq=False, slots=True)
class Chunk:
    """A piece of one tensor's memory that moves as a whole."""

    address: int
    nbytes: int
    resident: bool = False
    stored: bool = False  # has been paged out once; before, its bytes are zero and nothing has to be read
    in_use: int = 0
    last_use: int = 0  # on the window's clock; 0 for never
    period: int = 0  # between the last two uses; 0 for unknown
    arrival: Any = None  # an engine's handle of the move that brings it in, until somebody has waited for it
    release: Any = None  # an engine's mark of the work that used it last

    def next_use(self, now: int) -> float:
        """When it is expected to be used again: a period after its last use. Overdue by a whole period, or never used: never."""
        if self.period and (expected := self.last_use + self.period) + self.period >= now:
            return expected
        return float("inf") if self.period or not self.last_use else self.last_use - now


@dataclass
class Window:
    """The resident chunks, at most ``budget`` bytes (None: no limit).

    What leaves first is what is expected to be used last (Belady 1966): a step of an optimizer walks through its states in the
    same order each time, where the least recently used chunk is the one needed next and LRU would never hit. A chunk that
    was used once has no known period: such chunks leave least recently used first, after all whose next use is far.
    """

    budget: int | None
    held: int = 0
    total: int = 0
    chunks: set[Chunk] = field(default_factory=set)
    clock: itertools.count = field(default_factory=lambda: itertools.count(1))
    now: int = 0

    def admit(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            chunk.resident = True
            self.chunks.add(chunk)
            self.held += chunk.nbytes

    def expel(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            chunk.resident = False
            self.chunks.discard(chunk)
            self.held -= chunk.nbytes

    def use(self, chunks: Iterable[Chunk]) -> None:
        """A use of all of them at this tick of the clock."""
        self.now = next(self.clock)
        for chunk in chunks:
            chunk.period = self.now - chunk.last_use if chunk.last_use else 0
            chunk.last_use = self.now

    def victims(self, incoming: int, protected: Collection[Chunk]) -> list[Chunk] | None:
        """What has to leave so that ``incoming`` bytes fit; None where they don't fit without what is protected or in use."""
        if self.budget is None or (excess := self.held + incoming - self.budget) <= 0:
            return []
        found = []
        for chunk in sorted(self.chunks, key=lambda c: c.next_use(self.now), reverse=True):
            if not chunk.in_use and chunk not in protected:
                found.append(chunk)
                excess -= chunk.nbytes
                if excess <= 0:
                    return found
        return None
