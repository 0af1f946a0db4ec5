"""A batch: the threads of many blocks side by side, one numpy row a register."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .memory import AddressSpace, Lanes
from .shared import SharedMemory
from .types import DTYPE, SIZE

WARP = 32
POISON = 0xA5  # bytes of registers and of local memory before the kernel writes them
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """What every batch of a launch has in common."""

    grid: Triple
    block: Triple
    parameters: np.ndarray  # uint8
    dynamic_shared: int
    memory: AddressSpace

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.block[0] * self.block[1] * self.block[2]

    @property
    def padded(self) -> int:
        """Lanes of a block: whole warps."""
        return -(-self.threads // WARP) * WARP

    @property
    def blocks(self) -> int:
        """Of the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]


class State:
    """Registers, shared and local memory, clocks of one batch. A lane is a thread, or padding behind a block's last one.

    ``slots`` are the register rows under the types that the code uses them with. ``now`` counts synchronisations; what a thread
    did before its ``last_barrier`` is ordered for its block, before its ``last_sync`` for its warp.
    """

    def __init__(self, launch: Launch, first_block: int, blocks: int, rows: dict[int, int], slots: list[tuple[str, int]]):
        self.launch, self.first_block, self.blocks = launch, first_block, blocks
        self.width = launch.padded
        self.lanes = blocks * self.width
        self.memory = launch.memory
        self.block = np.repeat(np.arange(blocks), self.width)
        self.thread = np.tile(np.arange(self.width), blocks)
        self.exists = self.thread < launch.threads
        self.live = self.exists.copy()
        self.slots = self._registers(rows, slots)
        self.now = 1
        self.last_barrier = np.ones(self.lanes, np.int64)
        self.last_sync = np.ones(self.lanes, np.int64)
        self.carry = np.zeros(self.lanes, np.bool_)  # add.cc and its kin
        self._specials: dict[str, np.ndarray | np.generic] = {}
        self.shared: SharedMemory
        self.local: np.ndarray
        self.local_stride = 0

    def _registers(self, rows: dict[int, int], slots: list[tuple[str, int]]) -> list[np.ndarray]:
        arrays = {size: np.full((count, self.lanes * max(size, 1)), POISON, np.uint8) for size, count in rows.items()}
        if 0 in arrays:
            arrays[0].fill(0)
        views: dict[str, list[np.ndarray]] = {}
        for view in {view for view, _ in slots}:
            size = 0 if view == "pred" else SIZE.get(view, 16)
            views[view] = list(arrays[size].view(DTYPE[view]))
        return [views[view][row] for view, row in slots]

    def count(self, lanes: Lanes) -> int:
        """How many lanes."""
        return self.lanes if lanes is None else len(lanes)

    def numbers(self, lanes: Lanes) -> np.ndarray:
        """The lanes by number."""
        return np.arange(self.lanes) if lanes is None else lanes

    def warps(self, lanes: Lanes) -> np.ndarray | None:
        """The warps that have lanes among these; None for all."""
        return None if lanes is None else np.unique(lanes >> 5)

    def special(self, name: str) -> np.ndarray | np.generic:
        """A special register of every lane, or a scalar that holds for all."""
        if name not in self._specials:
            self._specials[name] = self._special(name)
        return self._specials[name]

    def _special(self, name: str) -> np.ndarray | np.generic:
        base, _, axis = name.partition(".")
        at = "xyz".index(axis) if axis else 0
        (nx, ny, _), (gx, gy, _) = self.launch.block, self.launch.grid
        thread, block = self.thread.astype(np.uint32), (self.block + self.first_block).astype(np.uint32)
        lane = thread & np.uint32(31)
        if base == "tid":
            return (thread % np.uint32(nx), thread // np.uint32(nx) % np.uint32(ny), thread // np.uint32(nx * ny))[at]
        if base == "ctaid":
            return (block % np.uint32(gx), block // np.uint32(gx) % np.uint32(gy), block // np.uint32(gx * gy))[at]
        ones = np.uint32(1) << lane
        return {
            "ntid": np.uint32(self.launch.block[at]),
            "nctaid": np.uint32(self.launch.grid[at]),
            "laneid": lane,
            "warpid": thread >> np.uint32(5),
            "nwarpid": np.uint32(self.width // WARP),
            "smid": np.uint32(0),
            "nsmid": np.uint32(1),
            "gridid": np.uint64(0),
            "lanemask_eq": ones,
            "lanemask_lt": ones - np.uint32(1),
            "lanemask_le": (ones - np.uint32(1)) | ones,
            "lanemask_gt": ~((ones - np.uint32(1)) | ones),
            "lanemask_ge": ~(ones - np.uint32(1)),
            "dynamic_smem_size": np.uint32(self.launch.dynamic_shared),
            "total_smem_size": np.uint32(self.shared.nbytes),
        }[base]

    def place(self, lane: int) -> tuple[Triple, Triple]:
        """Block and thread of a lane."""
        block, thread = int(self.block[lane]) + self.first_block, int(self.thread[lane])
        return unflatten(block, self.launch.grid), unflatten(thread, self.launch.block)


def unflatten(number: int, shape: Triple) -> Triple:
    """x, y, z of a number that counts x fastest."""
    return number % shape[0], number // shape[0] % shape[1], number // (shape[0] * shape[1])


def warp_bits(s: State, among: np.ndarray, lanes: np.ndarray) -> np.ndarray:
    """For each of ``lanes`` the bits of its warp's lanes that are among others."""
    there = np.zeros(s.lanes, np.bool_)
    there[among] = True
    return np.packbits(there.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32).ravel()[lanes >> 5]
