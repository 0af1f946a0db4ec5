"""Gates on what the compilers emit, as data: gates.csv holds every GPU kernel of peftk to its plan, peers.csv tells how
bitsandbytes' kernels are counted. The first row of a file that matches a kernel is its row.

op            peftk's op
backend       cuda, triton, bitsandbytes
kernel        glob on the name: C++'s with template arguments, Triton's as launches.py makes it
target        sm_80 …, gfx942 … (compiled, held to no spills), or *
region        what is counted (flow.py): path = main path; loop = a round of the hot loop; once = main path whose loops go
              round once, as they are launched, where the other two may hold no loop
elements      weights or values that a thread does in the region
bytes         an element's, to and from memory where every byte crosses once
flop          an element's, on tensor cores
threads       of a block, where the kernel has no __launch_bounds__ (our own must)
dynamic       bytes of dynamic shared memory a CUDA launch asks for; Triton's are in the compiled kernel
registers     most a thread may have
shared        most bytes of a block, static and dynamic
blocks        fewest blocks that must fit a multiprocessor
instructions  most a thread may issue for an element in the region
wide          least share of global bytes in the region by accesses of 128 bits or more
needs         opcodes that the region must hold, with modifiers where they matter (STG.128); a|b where either will do
forbids       opcodes that the kernel mustn't hold anywhere
note          why, where a cell needs it

An empty cell is no limit. LDL, STL and stack, so spills and local arrays, are a miss whatever the row says.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bench.static import flow, occupancy
from bench.static.sass import Kernel

FOLDER = Path(__file__).parent
AMORTISED = 0.9  # constants of blocks may be read outside the counted region
GATES, PEERS = FOLDER / "gates.csv", FOLDER / "peers.csv"


@dataclass(frozen=True)
class Gate:
    """A row of gates.csv or peers.csv; the columns are told above."""

    op: str
    backend: str
    kernel: str
    target: str
    region: str
    elements: float | None = None
    bytes: float | None = None
    flop: float | None = None
    threads: float | None = None
    dynamic: float | None = None
    registers: float | None = None
    shared: float | None = None
    blocks: float | None = None
    instructions: float | None = None
    wide: float | None = None
    needs: str = ""
    forbids: str = ""
    note: str = ""

    def matches(self, op: str, backend: str, kernel: str, target: str) -> bool:
        return (op, backend) == (self.op, self.backend) and fnmatchcase(kernel, self.kernel) and self.target in (target, "*")


@dataclass(frozen=True)
class Row:
    """A compiled kernel beside its gate."""

    op: str
    backend: str
    kernel: str
    target: str
    registers: int
    shared: int  # bytes, static and dynamic
    stack: int  # bytes a thread
    spills: int  # instructions on local memory; on AMD registers spilt
    threads: int
    blocks: int | None  # that fit a multiprocessor
    occupancy: float | None
    instructions: int | None  # in the region
    per_element: float | None
    wide: float | None
    mma: str
    bytes: float
    flop: float
    misses: tuple[str, ...]  # what the gate says against it

    @property
    def met(self) -> str:
        return "missed: " + "; ".join(self.misses) if self.misses else "met"


def read(path: Path = GATES) -> list[Gate]:
    """The rows of a file. ValueError names a cell that can't be one."""
    with path.open(newline="") as file:
        return [_gate(cells, f"{path.name}, row {number}") for number, cells in enumerate(csv.DictReader(file), 2)]


def _gate(cells: dict[str, str], where: str) -> Gate:
    known = {field.name: field for field in fields(Gate)}
    if unknown := set(cells) - set(known):
        raise ValueError(f"{where}: unknown columns {sorted(map(str, unknown))}, expected some of {list(known)}")
    values: dict[str, Any] = {}
    for name, cell in cells.items():
        if "float" not in str(known[name].type):
            values[name] = cell
        elif cell:
            try:
                values[name] = float(cell)
            except ValueError:
                raise ValueError(f"{where}, {name}: expected a number, got {cell!r}") from None
    if values["region"] not in flow.REGIONS:
        raise ValueError(f"{where}, region: expected one of {', '.join(flow.REGIONS)}, got {values['region']!r}")
    return Gate(**values)


def find(gates: Iterable[Gate], op: str, backend: str, kernel: str, target: str) -> Gate | None:
    """The first that matches."""
    return next((gate for gate in gates if gate.matches(op, backend, kernel, target)), None)


def unused(gates: Sequence[Gate], kernels: Iterable[tuple[str, str, str, str]]) -> list[Gate]:
    """Gates that are none's of these kernels: op, backend, kernel, target."""
    used = [find(gates, *kernel) for kernel in kernels]
    return [gate for gate in gates if gate not in used]


def judge(kernel: Kernel, gate: Gate | None, op: str, backend: str, target: str, dynamic: int | None = None) -> Row:
    """A kernel of a cubin beside its gate; without one, that is what is missed. ``dynamic``: bytes of dynamic shared memory,
    where the compiler knows them."""
    shared = kernel.shared + int(dynamic if dynamic is not None else gate and gate.dynamic or 0)
    threads = kernel.threads or int(gate and gate.threads or 0)
    capability = occupancy.capability(target)
    blocks = occupancy.blocks_per_sm(kernel.registers, shared, threads, capability) if threads else None
    misses = _against_memory(kernel)
    counted = None
    if gate is None:
        misses.append("no row of gates.csv matches it")
    else:
        try:
            counted = flow.counted(kernel, gate.region)
            misses += _against_region(kernel, counted, gate)
        except ValueError as reason:
            misses.append(str(reason))
        misses += _against_resources(kernel, shared, blocks, gate)
    each = counted.instructions / gate.elements if counted and gate and gate.elements else None
    return Row(
        op,
        backend,
        kernel.name,
        target,
        kernel.registers,
        shared,
        kernel.stack + kernel.local,
        kernel.spills,
        threads,
        blocks,
        None if blocks is None else occupancy.occupancy(blocks, threads, capability),
        counted and counted.instructions,
        each,
        counted and counted.wide_share,
        counted.mma if counted else "",
        gate and gate.bytes or 0,
        gate and gate.flop or 0,
        tuple(misses),
    )


def _against_memory(kernel: Kernel) -> list[str]:
    """No kernel may touch local memory."""
    misses = []
    if kernel.spills:
        misses.append(f"{kernel.count('LDL')} LDL and {kernel.count('STL')} STL (spills or local arrays), allowed: none")
    if stack := kernel.stack + kernel.local:
        misses.append(f"{stack} bytes of stack a thread, allowed: none")
    return misses


def _against_resources(kernel: Kernel, shared: int, blocks: int | None, gate: Gate) -> list[str]:
    misses = []
    if gate.registers is not None and kernel.registers > gate.registers:
        misses.append(f"{kernel.registers} registers, allowed: {gate.registers:.0f}")
    if gate.shared is not None and shared > gate.shared:
        misses.append(f"{shared} bytes of shared memory, allowed: {gate.shared:.0f}")
    if gate.backend == "cuda" and not kernel.threads:
        misses.append("no __launch_bounds__")
    if gate.blocks is not None and (blocks is None or blocks < gate.blocks):
        misses.append(f"{blocks} blocks fit a multiprocessor, planned: {gate.blocks:.0f}")
    return misses


def _against_region(kernel: Kernel, counted: flow.Counted, gate: Gate) -> list[str]:
    misses = []
    if gate.region != "once" and counted.loops:
        misses.append(
            f"{counted.loops} loops inside the counted {gate.region}: count one of them, or say that they go round once"
        )
    if counted.calls:
        misses.append(f"{counted.calls} calls in the counted region, whose instructions aren't counted")
    if gate.instructions is not None:
        if not gate.elements:
            raise ValueError("the gate limits instructions and tells no elements")
        if (each := counted.instructions / gate.elements) > gate.instructions:
            count = f"{counted.instructions} for {gate.elements:g}"
            misses.append(f"{each:.2f} instructions an element ({count}), allowed: {gate.instructions:g}")
    if gate.bytes and gate.elements and counted.global_bytes < AMORTISED * gate.bytes * gate.elements:
        takes = f"{gate.elements:g} elements take {gate.bytes * gate.elements:.0f}"
        misses.append(f"{counted.global_bytes} bytes move in the counted region and {takes}: elements is too large")
    if gate.wide is not None and (counted.wide_share or 0) < gate.wide:
        misses.append(f"{counted.wide_share or 0:.0%} of global bytes by 128-bit accesses, at least: {gate.wide:.0%}")
    for wanted in gate.needs.split():
        if not any(instruction.has(wanted) for instruction in counted.every):
            misses.append(f"no {wanted} in the counted region")
    for unwanted in gate.forbids.split():
        if number := sum(instruction.has(unwanted) for instruction in kernel.instructions):
            misses.append(f"{number} {unwanted}, allowed: none")
    return misses
