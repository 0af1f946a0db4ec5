"""What a launch did: counts that cost nothing, and on demand the memory system's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .decode import Program
from .memory import Lanes

SECTOR = 5  # log2 of the bytes that memory moves at least
BANKS = 32  # of shared memory, 4 bytes wide


@dataclass
class Traffic:
    """By warp and instruction: requests to global memory and the 32-byte sectors they touch; passes through shared memory's banks
    and how many of them only conflicts made necessary."""

    requests: int = 0
    sectors: int = 0
    wavefronts: int = 0
    conflicts: int = 0

    def global_access(self, lanes: Lanes, address: np.ndarray, size: int) -> None:
        """``size`` bytes by each lane, aligned."""
        warp = warps(lanes, len(address))
        self.requests += len(np.unique(warp))
        self.sectors += len(distinct(warp, address >> np.uint64(SECTOR))[0])

    def shared_access(self, lanes: Lanes, address: np.ndarray, size: int) -> None:
        """A warp's 64-bit accesses go in two passes, 128-bit ones in four: each over 32 banks, a word a bank at a time."""
        numbers = np.arange(len(address)) if lanes is None else lanes
        lanes_of_pass = BANKS * 4 // max(size, 4)
        passes = numbers // lanes_of_pass
        words = max(1, size // 4)
        word = ((address.astype(np.int64) >> 2)[:, None] + np.arange(words)).ravel()
        which, word = distinct(np.repeat(passes, words), word)
        _, which = np.unique(which, return_inverse=True)
        of_bank = np.bincount(which * BANKS + word % BANKS, minlength=(which.max() + 1) * BANKS).reshape(-1, BANKS)
        self.wavefronts += int(of_bank.max(1).sum())
        self.conflicts += int((of_bank.max(1) - 1).sum())


def warps(lanes: Lanes, count: int) -> np.ndarray:
    return (np.arange(count) if lanes is None else lanes) >> 5


def distinct(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pairs (a, b), each once."""
    order = np.lexsort((b, a))
    a, b = a[order], b[order]
    new = np.r_[True, (a[1:] != a[:-1]) | (b[1:] != b[:-1])]
    return a[new], b[new]


@dataclass
class Report:
    """Sums over a launch's threads. Bytes by state space; ``accesses`` by space, "load" or "store", and bytes of one access."""

    threads: int
    instructions: Counter[str] = field(default_factory=Counter)
    bytes_loaded: Counter[str] = field(default_factory=Counter)
    bytes_stored: Counter[str] = field(default_factory=Counter)
    accesses: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    traffic: Traffic | None = None

    def wide_share(self, space: str, direction: str = "load") -> float:
        """The share of a space's bytes that moved in accesses of 128 bits."""
        moved = {key: count * key[2] for key, count in self.accesses.items() if key[:2] == (space, direction)}
        return sum(n for key, n in moved.items() if key[2] == 16) / max(1, sum(moved.values()))

    def add(self, program: Program, executed: list[int]) -> None:
        """Counts of lanes by statement."""
        for statement, count in zip(program.entry.statements, executed, strict=False):
            if count:
                self.instructions[statement.opcode] += count
        for index, accesses in program.accesses.items():
            for access in accesses:
                self._move(access.space, "load", access.loads, executed[index], self.bytes_loaded)
                self._move(access.space, "store", access.stores, executed[index], self.bytes_stored)

    def _move(self, space: str, direction: str, nbytes: int, times: int, total: Counter[str]) -> None:
        if nbytes and times:
            total[space] += nbytes * times
            self.accesses[(space, direction, nbytes)] += times
