"""A check on demand: no two threads of a launch store different values to one byte of global memory.

Stores that a barrier or a lock orders count all the same, so that it is for kernels whose every output has one writer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .faults import Race
from .memory import Lanes, lane_of

if TYPE_CHECKING:
    from .memory import AddressSpace, Segment


class Writers:
    """The last writer of every byte; ``first_thread`` numbers the batch's lane 0 within the launch."""

    def __init__(self) -> None:
        self.first_thread = 0
        self.owners: dict[int, np.ndarray] = {}

    def check(self, space: AddressSpace, lanes: Lanes, segment: Segment, address: np.ndarray, values: np.ndarray) -> None:
        """Before ``values`` (n, bytes) go to the addresses, which lie in the segment."""
        owner = self.owners.setdefault(segment.start, np.zeros(segment.end - segment.start, np.uint32))
        numbers = np.arange(len(address)) if lanes is None else lanes
        thread = (numbers + (self.first_thread + 1)).astype(np.uint32)[:, None]
        place = (address - np.uint64(segment.start)).astype(np.int64)[:, None] + np.arange(values.shape[1])
        before = owner[place]
        _, raw = segment.view(1)
        self.refuse(space, lanes, address, (before != 0) & (before != thread) & (raw[place] != values))
        owner[place] = thread
        lost = owner[place] != thread  # another lane of this very instruction has the byte
        if lost.any():
            written = np.zeros(owner.shape, np.uint8)
            written[place] = values
            self.refuse(space, lanes, address, lost & (written[place] != values))

    def refuse(self, space: AddressSpace, lanes: Lanes, address: np.ndarray, wrong: np.ndarray) -> None:
        if wrong.any():
            at, byte = (int(n[0]) for n in np.nonzero(wrong))
            where = space.near(int(address[at]) + byte, 1)
            raise Race(f"stores another value than another thread stored {where}", lane_of(lanes, at))
