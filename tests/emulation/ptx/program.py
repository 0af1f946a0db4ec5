"""A PTX module that can be launched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import instructions  # noqa: F401  registers the decoders
from .counts import Report, Traffic
from .decode import decode
from .memory import AddressSpace, Memory, Range
from .parse import parse
from .schedule import Scheduler
from .shared import SharedMemory
from .state import POISON, Launch, State, Triple
from .writers import Writers

LANES = 16384  # of a batch: enough that numpy's call overhead vanishes, few enough for the caches
SHARED_BYTES = 4 << 20  # of a batch


class Program:
    """The kernels of a PTX text. Its .global variables live as long as it does."""

    def __init__(self, text: str):
        module = parse(text)
        self.variables: dict[str, np.ndarray] = {}
        self.ranges: list[Range] = []
        for variable in module.variables.values():
            if variable.space in ("global", "const"):
                self._allocate(variable.name, variable.size, variable.initial, variable.space == "global")
        symbols = {name: array.ctypes.data for name, array in self.variables.items()}
        self.entries = {name: decode(entry, module, symbols) for name, entry in module.entries.items()}

    def _allocate(self, name: str, size: int, initial: bytes | None, writable: bool) -> None:
        storage = np.zeros(size + 256, np.uint8)
        start = -storage.ctypes.data % 256
        array = storage[start : start + size]
        if initial is not None:
            array[:] = np.frombuffer(initial, np.uint8)
        self.variables[name] = array
        self.ranges.append(Range(array.ctypes.data, size, name, writable))

    def run(
        self,
        entry: str,
        grid: Triple,
        block: Triple,
        shared_bytes: int,
        parameters: Sequence[bytes],
        memory: Memory,
        *,
        traffic: bool = False,
        one_writer: bool = False,
    ) -> Report:
        """One launch. ``parameters``: each one's raw bytes; ``shared_bytes``: dynamic shared memory of a block.

        ``traffic``: the report tells sectors and bank conflicts. ``one_writer``: two threads that store different values to one
        byte of global memory are a Race. Raises Fault where the kernel errs, ValueError for a launch that no GPU would take.
        """
        if entry not in self.entries:
            raise ValueError(f"entry: {entry!r} came, the module has {', '.join(self.entries)}")
        if min(*grid, *block) < 1 or block[0] * block[1] * block[2] > 1024:
            raise ValueError(f"grid {grid}, block {block}: every extent must be positive, a block has at most 1024 threads")
        program = self.entries[entry]
        raw = self._parameters(entry, parameters)
        space = AddressSpace([*memory.ranges, *self.ranges, Range(raw.ctypes.data, len(raw), "parameters", False)])
        seen = Traffic() if traffic else None
        space.traffic, space.writers = seen, Writers() if one_writer else None
        launch = Launch(grid, block, raw, shared_bytes, space)
        kernel = program.entry
        dynamic = [offset for name, offset in kernel.shared.items() if offset >= kernel.shared_bytes]
        nbytes = max(dynamic, default=kernel.shared_bytes) + shared_bytes
        report = Report(launch.blocks * launch.threads, traffic=seen)
        executed = [0] * (len(program.steps) + 1)
        together = max(1, min(LANES // launch.padded, SHARED_BYTES // max(nbytes, 1), launch.blocks))
        with np.errstate(all="ignore"):
            for first in range(0, launch.blocks, together):
                s = State(launch, first, min(together, launch.blocks - first), kernel.rows, program.slots)
                s.shared = SharedMemory(s.blocks, nbytes, program.shared_granule, s.lanes, seen)
                if space.writers:
                    space.writers.first_thread = first * launch.padded
                s.local_stride = -(-kernel.local_bytes // 16) * 16
                s.local = np.full(s.lanes * s.local_stride, POISON, np.uint8)
                Scheduler(program, s, executed).run()
        report.add(program, executed)
        return report

    def _parameters(self, entry: str, parameters: Sequence[bytes]) -> np.ndarray:
        kernel = self.entries[entry].entry
        if len(parameters) != len(kernel.parameters):
            raise ValueError(f"{entry}: {len(parameters)} parameters came, it takes {len(kernel.parameters)}")
        raw = np.zeros(kernel.parameter_bytes + 16, np.uint8)
        raw = raw[-raw.ctypes.data % 16 :][: kernel.parameter_bytes]
        for (name, (offset, size)), value in zip(kernel.parameters.items(), parameters, strict=True):
            if len(value) != size:
                raise ValueError(f"{entry}: {len(value)} bytes came for {name}, which has {size}")
            raw[offset : offset + size] = np.frombuffer(value, np.uint8)
        return raw
