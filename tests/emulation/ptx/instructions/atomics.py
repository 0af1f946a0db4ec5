"""atom and red: read, change, write, one lane after the other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..decode import Decoder, Get, Step, Values, instruction
from ..memory import Lanes
from ..state import State
from ..types import SIZE, UNSIGNED, dtype_of
from .half import bits_to_f64, f64_to_bits, packed
from .memory import by_space, qualifiers

Change = Callable[..., Values]
OPERATIONS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
KINDS = ("b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64", "f16", "f16x2", "bf16", "bf16x2", "b16", "b128")


@instruction("atom", "red")
def atomic(d: Decoder) -> Step:
    kind = d.kind(*KINDS)
    d.take("noftz")
    operation = d.need(*OPERATIONS)
    if d.take("v2", "v4") or kind == "b128":
        raise d.unsupported()
    space = qualifiers(d)
    size = SIZE[kind]
    returns = d.name == "atom"
    count = (3 if operation == "cas" else 2) + returns
    if len(d.operands) == count + 1:  # a cache policy
        d.operands = d.operands[:count]
    d.arity(count)
    change = changes(d, operation, kind)
    d.moves(space, loads=size, stores=size)
    if space in ("shared", "generic"):
        d.watches_shared(size)
    address = d.address(1 if returns else 0, space)
    sources = [d.source(n, kind) for n in range(2 if returns else 1, count)]
    put = d.target(0, kind) if returns else None
    return atomic_step(space, size, kind, address, sources, put, change)


def atomic_step(space: str, size: int, kind: str, address: Get, sources: list[Get], put, change: Change) -> Step:
    bits, dtype = UNSIGNED[size], dtype_of(kind)

    def step(s: State, lanes: Lanes) -> None:
        at = address(s, lanes)
        operands = [np.broadcast_to(get(s, lanes), at.shape) for get in sources]
        old = np.empty(at.shape, bits)
        for view, chosen, index in places(s, lanes, space, at, size):
            old[chosen] = apply(view, index, [o[chosen] for o in operands], change, dtype)
        if put:
            put(s, lanes, old.view(dtype))

    return step


def places(s: State, lanes: Lanes, space: str, at: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Arrays of words with the positions whose words lie there and their indices."""
    parts = by_space(s, lanes, at) if space == "generic" else [(space, np.arange(len(at)), s.numbers(lanes), at)]
    found = []
    for where, here, numbers, place in parts:
        if where == "shared":
            view, index = s.shared.atomic(s, numbers, place, size)
            found.append((view, here, index))
        else:
            for view, chosen, index in s.memory.places(numbers, place, size):
                found.append((view, here if chosen is None else here[chosen], index))
    return found


def apply(view: np.ndarray, index: np.ndarray, operands: list[np.ndarray], change: Change, dtype: np.dtype) -> np.ndarray:
    """Changes the words, lanes in ascending order where several want one; returns what each found."""
    old = np.empty(index.shape, view.dtype)
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    turn = np.arange(len(ordered)) - np.repeat(starts, np.diff(np.r_[starts, len(ordered)]))
    by_turn = np.argsort(turn, kind="stable")
    for these in np.split(order[by_turn], np.cumsum(np.bincount(turn))[:-1]):
        words = index[these]
        found = view[words]
        old[these] = found
        new = change(found.view(dtype), *[o[these] for o in operands])
        view[words] = np.asarray(new).astype(dtype, copy=False).view(view.dtype)
    return old


def changes(d: Decoder, operation: str, kind: str) -> Change:
    """(found, operand, …) -> what is written."""
    if kind in ("f16", "f16x2", "bf16", "bf16x2"):
        if operation != "add":
            raise d.unsupported()
        bf = kind.startswith("bf")

        def halves(a: Values, b: Values) -> Values:
            return f64_to_bits(bits_to_f64(a, bf, False) + bits_to_f64(b, bf, False), bf, False, False)

        if kind == "f16":
            return lambda a, b: halves(a.view(np.uint16), b.view(np.uint16)).view(np.float16)
        return packed(kind, halves)
    if operation == "add" and kind == "f32":
        # global f32 atomics keep denormals on sm_80; .ftz doesn't exist for them
        return np.add
    functions: dict[str, Change] = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "exch": lambda found, new: new,
        "cas": lambda found, expected, new: np.where(found == expected, new, found),
        "inc": lambda found, limit: np.where(found >= limit, found.dtype.type(0), found + found.dtype.type(1)),
        "dec": lambda found, limit: np.where((found == 0) | (found > limit), limit, found - found.dtype.type(1)),
    }
    if kind in ("f32", "f64") and operation not in ("add", "exch"):
        raise d.unsupported()
    return functions[operation]
