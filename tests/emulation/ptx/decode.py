"""One statement of PTX -> one Python closure ``step(state, lanes)``. Families of instructions register their decoders here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .faults import Unsupported
from .memory import Lanes
from .state import State
from .syntax import Address, Entry, Immediate, Not, Operand, Pair, Register, Sink, Special, Statement, Symbol, Vector
from .types import SIZE, VIEW, dtype_of, is_float

Values = Any  # a numpy array of the active lanes, or a numpy scalar that holds for all of them
Get = Callable[[State, Lanes], Values]
Put = Callable[[State, Lanes, Values], None]
Step = Callable[[State, Lanes], None]

SHARED_WINDOW = 1 << 56  # where generic addresses of shared and local memory begin: no host address lies there
LOCAL_WINDOW = 2 << 56
WINDOW = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "global": 0, "const": 0, "param": 0}

DECODERS: dict[str, Callable[[Decoder], Any]] = {}


def instruction(*names: str) -> Callable[[Callable[[Decoder], Any]], Callable[[Decoder], Any]]:
    """Registers the decoder of the instructions with these names."""

    def register(decoder: Callable[[Decoder], Any]) -> Callable[[Decoder], Any]:
        for name in names:
            DECODERS[name] = decoder
        return decoder

    return register


@dataclass
class Access:
    """What one execution by one thread moves, for the counts."""

    space: str
    loads: int
    stores: int


@dataclass
class Branch:
    """To one of ``labels``: the first, or the one that ``index`` chooses."""

    labels: tuple[str, ...]
    index: Get | None = None
    targets: tuple[int, ...] = ()


@dataclass
class Exit:
    """The threads are done."""


@dataclass
class Barrier:
    """Waits for ``threads`` of the block, all of them where None; ``step`` then runs on those released."""

    number: Get
    threads: Get | None
    aligned: bool
    step: Callable[[State, Lanes], None] | None = None


@dataclass
class Collective:
    """A step for which all members of a mask (uint32, by lane) have to be there; None: the whole warp."""

    step: Step
    mask: Get | None = None


Action = Branch | Exit | Barrier | Collective


@dataclass
class Code:
    """An entry, decoded: steps and actions by statement; ``slots`` are the register views that the steps use."""

    entry: Entry
    symbols: dict[str, int]  # addresses of .global and .const variables
    slots: list[tuple[str, int]] = field(default_factory=list)
    numbers: dict[tuple[str, int], int] = field(default_factory=dict)
    steps: list[Step | Action] = field(default_factory=list)
    actions: list[Action | None] = field(default_factory=list)
    guards: list[tuple[int, bool] | None] = field(default_factory=list)
    accesses: dict[int, list[Access]] = field(default_factory=dict)
    shared_granule: int = 16

    def slot(self, kind: str, register: Register) -> int:
        """The number of a register's row under a type's view."""
        key = (VIEW[kind], register.row)
        if key not in self.numbers:
            self.numbers[key] = len(self.slots)
            self.slots.append(key)
        return self.numbers[key]


def decode(entry: Entry, symbols: dict[str, int]) -> Code:
    """Every statement of an entry; Unsupported for the first that isn't known."""
    code = Code(entry, symbols)
    for statement in entry.statements:
        decoder = Decoder(code, statement)
        make = DECODERS.get(decoder.name)
        if make is None:
            raise decoder.unsupported()
        step = make(decoder)
        decoder.finish()
        if isinstance(step, Branch):
            step.targets = tuple(decoder.label(label) for label in step.labels)
        guard = statement.guard
        code.steps.append(step)
        code.actions.append(step if isinstance(step, Action) else None)
        code.guards.append((code.slot("pred", guard.register), guard.negated) if guard else None)
    return code


class Decoder:
    """One statement while it is decoded. Modifiers are taken one by one; what is left over isn't known."""

    def __init__(self, code: Code, statement: Statement):
        self.code, self.statement = code, statement
        self.name, *self.modifiers = [part for part in statement.opcode.replace("::", ":").split(".") if part]
        self.operands = statement.operands

    # ---- opcode ---------------------------------------------------------------------------------------------------------------

    def unsupported(self, why: str = "") -> Unsupported:
        return Unsupported(self.statement.text, self.statement.line, why)

    def take(self, *words: str) -> str:
        """The one of the words that is among the modifiers, taken out; empty where none is."""
        for word in words:
            if word in self.modifiers:
                self.modifiers.remove(word)
                return word
        return ""

    def need(self, *words: str) -> str:
        """Like take, but one has to be there."""
        if not (word := self.take(*words)):
            raise self.unsupported(f"one of {', '.join(words)} was expected")
        return word

    def kind(self, *allowed: str) -> str:
        """The last modifier, which is the type."""
        if not self.modifiers or self.modifiers[-1] not in (allowed or SIZE):
            raise self.unsupported("type")
        return self.modifiers.pop()

    def finish(self) -> None:
        """Everything must have been understood."""
        if self.modifiers:
            raise self.unsupported("." + " .".join(self.modifiers))

    def arity(self, *counts: int) -> None:
        if len(self.operands) not in counts:
            raise self.unsupported(f"{len(self.operands)} operands")

    # ---- operands -------------------------------------------------------------------------------------------------------------

    def label(self, name: str) -> int:
        """The statement behind a label."""
        if name not in self.code.entry.labels:
            raise self.unsupported(f"no such label as {name}")
        return self.code.entry.labels[name]

    def moves(self, space: str, loads: int = 0, stores: int = 0) -> None:
        """Notes for the counts what one thread moves, and for shared memory's checks how small its pieces are."""
        index = len(self.code.steps)
        self.code.accesses.setdefault(index, []).append(Access(space, loads, stores))

    def watches_shared(self, size: int) -> None:
        """Shared memory may be accessed in pieces of this size."""
        self.code.shared_granule = min(self.code.shared_granule, size)

    def constant(self, position: int) -> int:
        """An operand that has to be a number."""
        operand = self.operands[position]
        if not isinstance(operand, Immediate):
            raise self.unsupported(f"operand {position + 1} must be a constant")
        return operand.integer()

    def source(self, where: int | Operand, kind: str) -> Get:
        """Reads an operand (or the operand at a position) as a type; a wider register gives its low bits."""
        operand = self.operands[where] if isinstance(where, int) else where
        if isinstance(operand, Immediate):
            return constant(operand.scalar(kind))
        if isinstance(operand, Not):
            inner = self.source(operand.register, kind)
            return lambda s, lanes: ~inner(s, lanes)
        if isinstance(operand, Special):
            return self.special(operand.name, kind)
        if isinstance(operand, Symbol) and operand.name in self.code.entry.parameters:
            offset, dtype = self.code.entry.parameters[operand.name][0], dtype_of(kind)
            return lambda s, lanes: np.uint64(s.launch.parameters.ctypes.data + offset).astype(dtype)
        if isinstance(operand, Symbol):
            return constant(dtype_of(kind).type(self.symbol(operand.name)))
        if isinstance(operand, Vector):
            return self.packed(operand, kind)
        if not isinstance(operand, Register):
            raise self.unsupported(f"operand {operand}")
        if (operand.kind == "pred") != (kind == "pred"):
            raise self.unsupported(f"{operand.name} is a .{operand.kind}")
        if kind != "pred" and operand.size < SIZE[kind]:
            raise self.unsupported(f"{operand.name} is too narrow for .{kind}")
        if kind != "pred" and operand.size > SIZE[kind]:
            return self.narrowed(operand, kind)
        slot = self.code.slot(kind, operand)

        def get(s: State, lanes: Lanes) -> Values:
            row = s.slots[slot]
            return row if lanes is None else row[lanes]

        return get

    def narrowed(self, register: Register, kind: str) -> Get:
        slot = self.code.slot(f"u{8 * register.size}", register)
        bits, dtype = np.dtype(f"u{SIZE[kind]}"), dtype_of(kind)

        def get(s: State, lanes: Lanes) -> Values:
            row = s.slots[slot]
            return (row if lanes is None else row[lanes]).astype(bits).view(dtype)

        return get

    def special(self, name: str, kind: str) -> Get:
        dtype = dtype_of(kind)
        if name.startswith(("clock", "globaltimer")):
            shift = np.uint64(32 if name.endswith("_hi") else 0)
            return lambda s, lanes: (np.uint64(s.now) >> shift).astype(dtype)

        def get(s: State, lanes: Lanes) -> Values:
            value = s.special(name)
            if value.ndim and lanes is not None:
                value = value[lanes]
            return value if value.dtype == dtype else value.astype(dtype)

        return get

    def symbol(self, name: str) -> int:
        """The address of a variable in its own space."""
        for names in (self.code.entry.shared, self.code.entry.local, self.code.symbols):
            if name in names:
                return names[name]
        raise self.unsupported(f"no such variable as {name}")

    def packed(self, vector: Vector, kind: str) -> Get:
        """``{a, b}`` as one number, a lowest."""
        width = 8 * SIZE[kind] // len(vector.items)
        parts = [self.source(item, f"u{width}") for item in vector.items]
        whole, dtype = np.dtype(f"u{SIZE[kind]}"), dtype_of(kind)

        def get(s: State, lanes: Lanes) -> Values:
            value = parts[0](s, lanes).astype(whole)
            for number, part in enumerate(parts[1:], 1):
                value = value | (part(s, lanes).astype(whole) << whole.type(number * width))
            return value.view(dtype)

        return get

    def target(self, where: int | Operand, kind: str) -> Put:
        """Writes values of a type to an operand; a wider register is extended as the type's sign says."""
        operand = self.operands[where] if isinstance(where, int) else where
        if isinstance(operand, Sink):
            return lambda s, lanes, values: None
        if isinstance(operand, Vector):
            return self.unpacked(operand, kind)
        slot = self.target_slot(operand, kind)

        def put(s: State, lanes: Lanes, values: Values) -> None:
            s.slots[slot][... if lanes is None else lanes] = values

        return put

    def target_slot(self, operand: Operand, kind: str) -> int:
        """The slot of a destination register."""
        if not isinstance(operand, Register) or (operand.kind == "pred") != (kind == "pred"):
            raise self.unsupported(f"destination {operand}")
        if kind == "pred" or operand.size == SIZE[kind]:
            return self.code.slot(kind, operand)
        if operand.size < SIZE[kind]:
            raise self.unsupported(f"{operand.name} is too narrow for .{kind}")
        if is_float(kind) and kind != "bf16":
            raise self.unsupported(f"a .{kind} in {operand.name}")
        return self.code.slot(f"{'s' if kind[0] == 's' else 'u'}{8 * operand.size}", operand)

    def unpacked(self, vector: Vector, kind: str) -> Put:
        width = 8 * SIZE[kind] // len(vector.items)
        parts = [self.target(item, f"u{width}") for item in vector.items]
        whole, part_type = np.dtype(f"u{SIZE[kind]}"), np.dtype(f"u{width // 8}")

        def put(s: State, lanes: Lanes, values: Values) -> None:
            bits = values.view(whole)
            pieces = [(bits >> whole.type(n * width)).astype(part_type) for n in range(len(parts))]
            for part, piece in zip(parts, pieces, strict=True):
                part(s, lanes, piece)

        return put

    def items(self, where: int, count: int) -> tuple[Operand, ...]:
        """The operands of a vector, or the single one."""
        operand = self.operands[where]
        items = operand.items if isinstance(operand, Vector) else (operand,)
        if len(items) != count:
            raise self.unsupported(f"{count} registers were expected")
        return items

    def address(self, where: int, space: str) -> Get:
        """The uint64 address in its space of ``[base+offset]``, one for each active lane."""
        operand = self.operands[where]
        if not isinstance(operand, Address):
            raise self.unsupported("an address was expected")
        base, offset = operand.base, operand.offset
        if not isinstance(base, Register):
            place = base.integer() if isinstance(base, Immediate) else self.symbol(base.name)
            fixed = np.uint64((place + offset) & (2**64 - 1))
            return lambda s, lanes: np.full(s.count(lanes), fixed)
        if base.size == 4:
            narrow = self.source(base, "u32")
            shift = np.uint32(offset & 0xFFFFFFFF)
            return lambda s, lanes: (narrow(s, lanes) + shift).astype(np.uint64)
        wide = self.source(base, "u64")
        if not offset:
            return wide
        step = np.uint64(offset & (2**64 - 1))
        return lambda s, lanes: wide(s, lanes) + step

    def pair(self, where: int) -> tuple[Operand, Operand]:
        """``a|p``; a sink for a p that isn't there."""
        operand = self.operands[where]
        return (operand.first, operand.second) if isinstance(operand, Pair) else (operand, Sink())

    # ---- common shapes of steps -----------------------------------------------------------------------------------------------

    def elementwise(self, function: Callable[..., Values], result: str, *kinds: str) -> Step:
        """operand 0 (a ``result``) = function(operand 1, operand 2, …), of these types."""
        self.arity(len(kinds) + 1)
        sources = [self.source(n, kind) for n, kind in enumerate(kinds, 1)]
        if isinstance(function, np.ufunc) and isinstance(self.operands[0], Register) and len(sources) <= 2:
            slot = self.target_slot(self.operands[0], result)
            if result == "pred" or self.operands[0].size == SIZE[result]:
                return ufunc_step(function, slot, sources)
        put = self.target(0, result)
        if len(sources) == 1:
            (one,) = sources
            return lambda s, lanes: put(s, lanes, function(one(s, lanes)))
        if len(sources) == 2:
            one, two = sources
            return lambda s, lanes: put(s, lanes, function(one(s, lanes), two(s, lanes)))
        return lambda s, lanes: put(s, lanes, function(*[get(s, lanes) for get in sources]))


def constant(value: np.generic) -> Get:
    """The same for every lane."""
    return lambda s, lanes: value


def ufunc_step(ufunc: np.ufunc, slot: int, sources: list[Get]) -> Step:
    """A step that lets numpy write into the register's row."""
    if len(sources) == 1:
        (one,) = sources

        def unary(s: State, lanes: Lanes) -> None:
            if lanes is None:
                ufunc(one(s, None), out=s.slots[slot])
            else:
                s.slots[slot][lanes] = ufunc(one(s, lanes))

        return unary
    first, second = sources

    def binary(s: State, lanes: Lanes) -> None:
        if lanes is None:
            ufunc(first(s, None), second(s, None), out=s.slots[slot])
        else:
            s.slots[slot][lanes] = ufunc(first(s, lanes), second(s, lanes))

    return binary
