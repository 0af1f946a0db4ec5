"""The nouns of a parsed module: operands, statements, variables, entries."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from .types import DTYPE, SIZE, VIEW, dtype_of, is_float


@dataclass(frozen=True)
class Register:
    """``row`` counts the registers of its size within one entry."""

    name: str
    kind: str
    row: int

    @property
    def size(self) -> int:
        return 0 if self.kind == "pred" else SIZE[self.kind]


@dataclass(frozen=True)
class Immediate:
    """A number as written; its type is its place's."""

    text: str

    def integer(self) -> int:
        """Its value; a float that is written as bits gives the bits."""
        text = self.text.rstrip("uU") if self.text[:2] not in ("0f", "0F", "0d", "0D") else self.text
        if re.match(r"0[fFdD]", text):
            return int(text[2:], 16)
        if re.match(r"-?0[0-7]+$", text):
            return int(text, 8)
        return int(text, 0)

    def scalar(self, kind: str) -> np.generic:
        """As a numpy scalar of a PTX type."""
        dtype = dtype_of(kind)
        if kind == "pred":
            return np.bool_(self.integer() != 0)
        if re.match(r"0[fF]", self.text):
            value = np.array(int(self.text[2:], 16), np.uint32).view(np.float32)[()]
            if kind == "f64":
                return np.float64(value)
            return value if is_float(kind) else value.view(np.uint32).astype(dtype)
        if re.match(r"0[dD]", self.text):
            value = np.array(int(self.text[2:], 16), np.uint64).view(np.float64)[()]
            return value.astype(dtype) if is_float(kind) else value.view(np.uint64).astype(dtype)
        if is_float(kind) and re.search(r"[.]|\d[eE]", self.text) and not self.text.startswith("0x"):
            return dtype.type(float(self.text))
        if is_float(kind) and kind in ("f32", "f64") and not self.text.lower().startswith("0x"):
            return dtype.type(self.integer())
        bits = self.integer() & ((1 << (8 * dtype.itemsize)) - 1)
        return np.array(bits, DTYPE[f"u{8 * dtype.itemsize}"]).view(dtype)[()]


@dataclass(frozen=True)
class Special:
    """%tid.x and its kin."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A variable, a parameter or a label, by name."""

    name: str


@dataclass(frozen=True)
class Address:
    """``[base+offset]``."""

    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    """``{a, b}``; a PTX vector's first item lies lowest."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """``a|p``: two destinations."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Sink:
    """``_``: a destination that nobody wants."""


@dataclass(frozen=True)
class Not:
    """``!p`` as an operand."""

    register: Register


Operand = Register | Immediate | Special | Symbol | Address | Vector | Pair | Sink | Not


@dataclass(frozen=True)
class Guard:
    """``@p`` or ``@!p``."""

    register: Register
    negated: bool


@dataclass(frozen=True)
class Statement:
    """One instruction."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: Guard | None
    line: int
    text: str


@dataclass(frozen=True)
class Variable:
    """A .global, .const, .shared or .local array of ``size`` bytes; ``initial`` bytes are zero where None."""

    name: str
    space: str
    align: int
    size: int
    initial: bytes | None = None


@dataclass
class Entry:
    """One kernel. ``rows`` counts its registers by size (0: predicates), offsets of variables are in bytes."""

    name: str
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> offset, size
    parameter_bytes: int = 0
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, tuple[str, ...]] = field(default_factory=dict)  # .branchtargets
    rows: dict[int, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0

    def place(self, variable: Variable) -> None:
        """The next free offset in the variable's space."""
        used = self.shared_bytes if variable.space == "shared" else self.local_bytes
        offset = -(-used // variable.align) * variable.align
        names = self.shared if variable.space == "shared" else self.local
        names[variable.name] = offset
        if variable.space == "shared":
            self.shared_bytes = offset + variable.size
        else:
            self.local_bytes = offset + variable.size


@dataclass
class Module:
    """A PTX file: its kernels and the variables that they share."""

    entries: dict[str, Entry] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)


def view_of(kind: str) -> str:
    """The register view that holds a PTX type."""
    return VIEW[kind]
