"""What is resident, and what leaves first: a window of equal chunks under a budget. No memory is moved here."""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False, slots=True)
class Chunk:
    """A piece of pageable memory that moves as a whole."""

    address: int
    place: int  # where it lies on the backing store: an offset in the page file
    owner: weakref.ref  # of the object that keeps its memory; a move in flight holds that
    resident: bool = False
    stored: bool = False  # has been paged out before; until then its bytes are zero
    announced: bool = False  # was fetched ahead and has not been used since
    in_use: int = 0
    last_use: int = 0  # on the window's clock; 0 for never
    period: int = 0  # between the last two uses; 0 for unknown
    moving: Any = None  # the engine's: the last move of it
    release: Any = None  # the engine's: the work that used it last

    def next_use(self, now: int) -> float:
        """When it is expected again: a period after its last use; overdue by another period, never. Of those without a known
        period, the one used last is expected first."""
        if not self.period:
            return now + 1 / self.last_use if self.last_use else now
        expected = self.last_use + self.period
        return math.inf if expected + self.period < now else expected


@dataclass
class Window:
    """The resident chunks, at most ``most`` of them (None: no limit).

    What is expected to be used last leaves first (Belady 1966): an optimizer's step walks through its states in the same order
    every time, where the least recently used chunk is the one needed next, and LRU would never hit. Before the second step
    nothing is known of a chunk's next use, and the least recently used leaves first.
    """

    most: int | None
    chunks: set[Chunk] = field(default_factory=set)
    now: int = 0

    def admit(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            chunk.resident = True
            self.chunks.add(chunk)

    def expel(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            chunk.resident = chunk.announced = False
            self.chunks.discard(chunk)

    def use(self, chunks: Iterable[Chunk]) -> None:
        """A use of all of them, at the clock's next tick."""
        self.now += 1
        for chunk in chunks:
            chunk.period = self.now - chunk.last_use if chunk.last_use else 0
            chunk.last_use = self.now

    def victims(self, incoming: int, protected: Collection[Chunk]) -> list[Chunk] | None:
        """What has to leave so that ``incoming`` more chunks fit; None where what is protected or in use takes the room."""
        if self.most is None or (excess := len(self.chunks) + incoming - self.most) <= 0:
            return []
        free = [chunk for chunk in self.chunks if not chunk.in_use and chunk not in protected]
        free.sort(key=lambda chunk: chunk.next_use(self.now), reverse=True)
        return free[:excess] if len(free) >= excess else None
