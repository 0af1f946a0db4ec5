"""What is in a cubin: of each kernel its registers, memory and threads, and its instructions as nvdisasm prints them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from bench.static import tools

GLOBAL = {"LDG", "STG", "LDGSTS", "LD", "ST"}  # LD and ST are generic: nvcc emits them where it lost track of the space
SPILL = {"LDL", "STL"}
MMA = re.compile(r"(?:UTC)?[HIDQOBF]G?MMA$")  # HMMA IMMA …, Hopper's HGMMA …, tcgen05's UTCHMMA …; not HFMA2.MMA

RESERVING, RESERVED = 90, 1024  # from sm_90 on, cuobjdump's SHARED holds the bytes that the system takes of each block

_TARGET = re.compile(r"(?:EF_CUDA_SM|\.target\s+sm_)(\d+)")
_SECTION = re.compile(r"\s*\.section\s+(\S+?),")
_LABEL = re.compile(r"(\S+):\s*$")
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[0-9T]+)\s+)?([A-Z][A-Z0-9_]*(?:\.[\w?]+)*)\s*(.*?)\s*;")
_BOUNDS = re.compile(r"EIATTR_(?:MAX_THREADS|REQNTID)$")
_WORD = re.compile(r"\.word\s+0x([0-9a-f]+)")
_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # "" or a predicate: P0, !UP1
    opcode: str  # with modifiers: LDG.E.128.CONSTANT
    operands: str

    @cached_property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.opcode.split("."))

    @property
    def base(self) -> str:
        return self.parts[0]

    @property
    def is_mma(self) -> bool:
        return bool(MMA.match(self.base))

    @property
    def global_bytes(self) -> int:
        """A thread's bytes to or from global memory; 0 for anything but a load or a store there."""
        if self.base not in GLOBAL:
            return 0
        for modifier, width in (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
            if modifier in self.parts:
                return width
        return 4

    def has(self, wanted: str) -> bool:
        """Whether this is ``wanted``: a base with or without modifiers, in any order (STG.128), or several with | between."""
        return any((parts := one.split("."))[0] == self.base and set(parts) <= set(self.parts) for one in wanted.split("|"))


@dataclass
class Kernel:
    """One entry of a cubin."""

    name: str  # demangled, without parameters
    symbol: str
    registers: int = 0
    shared: int = 0  # bytes of static shared memory
    stack: int = 0  # bytes a thread: spills, local arrays
    local: int = 0
    threads: int = 0  # of a block, from __launch_bounds__; 0 where the kernel doesn't say
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> address

    def count(self, *bases: str) -> int:
        return sum(instruction.base in bases for instruction in self.instructions)

    @property
    def spills(self) -> int:
        """Instructions that touch local memory."""
        return self.count(*SPILL)


def kernels(cubin: Path, wanted: Callable[[str], object] = lambda name: True) -> list[Kernel]:
    """The kernels of a cubin whose demangled names are ``wanted``. RuntimeError where the disassemblers are missing or fail."""
    found = _RESOURCES.findall(tools.output("cuobjdump", "-res-usage", cubin))
    plain = tools.demangled([symbol for symbol, *_ in found])
    by_symbol = {
        symbol: Kernel(plain[symbol], symbol, *map(int, (registers, shared, stack, local)))
        for symbol, registers, stack, shared, local in found
        if wanted(plain[symbol])
    }
    _read_code(tools.output("nvdisasm", cubin), by_symbol)
    return [kernel for kernel in by_symbol.values() if kernel.instructions]


def _read_code(text: str, by_symbol: dict[str, Kernel]) -> None:
    """Instructions and labels from .text.<symbol>, launch bounds from .nv.info.<symbol>; ``shared`` without what isn't the
    kernel's own."""
    if int(_TARGET.search(text)[1]) >= RESERVING:
        for kernel in by_symbol.values():
            kernel.shared = max(0, kernel.shared - RESERVED)
    kernel, in_code, bounds = None, False, 0
    for line in text.splitlines():
        if section := _SECTION.match(line):
            name = section[1].strip('"')
            in_code = name.startswith(".text.")
            kernel = by_symbol.get(name.removeprefix(".text.").removeprefix(".nv.info."))
        elif kernel is None:
            continue
        elif in_code:
            if instruction := _INSTRUCTION.match(line):
                address, guard, opcode, operands = instruction.groups()
                kernel.instructions.append(Instruction(int(address, 16), guard or "", opcode, operands))
            elif label := _LABEL.match(line):
                kernel.labels[label[1]] = kernel.instructions[-1].address + 16 if kernel.instructions else 0
        elif _BOUNDS.search(line):
            kernel.threads, bounds = 1, 3
        elif bounds and (word := _WORD.search(line)):
            kernel.threads *= int(word[1], 16)
            bounds -= 1
