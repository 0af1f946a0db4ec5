"""cp.async: from global to shared memory, seen only after the wait."""

from __future__ import annotations

import numpy as np

from ..decode import Decoder, Step, instruction
from ..memory import Lanes
from ..state import State
from ..syntax import Not, Register
from ..types import UNSIGNED


@instruction("cp")
def copy_async(d: Decoder) -> Step:
    d.need("async")
    if d.take("commit_group"):
        d.arity(0)
        return lambda s, lanes: s.shared.commit(s, lanes)
    if d.take("wait_all"):
        d.arity(0)
        return lambda s, lanes: s.shared.wait(s, lanes, None)
    if d.take("wait_group"):
        d.arity(1)
        newest = d.constant(0)
        return lambda s, lanes: s.shared.wait(s, lanes, newest)
    cached = d.need("ca", "cg")
    d.need("shared", "shared:cta")
    d.need("global")
    d.take("L2:64B", "L2:128B", "L2:256B")
    if d.take("L2:cache_hint"):
        d.operands = d.operands[:-1]
    d.arity(3, 4)
    size = d.constant(2)
    if size not in ((4, 8, 16) if cached == "ca" else (16,)):
        raise d.unsupported(f"{size} bytes")
    target, source = d.address(0, "shared"), d.address(1, "global")
    given = how_much(d, size)
    d.moves("global", loads=size)
    d.moves("shared", stores=size)
    d.watches_shared(size)

    def step(s: State, lanes: Lanes) -> None:
        address = source(s, lanes)
        if given is None:
            values = s.memory.load(lanes, address, size)
        else:
            values = zero_filled(s, lanes, address, np.broadcast_to(given(s, lanes), address.shape), size)
        s.shared.copy_async(s, lanes, target(s, lanes), values, size)

    return step


def how_much(d: Decoder, size: int):
    """Bytes to read, by lane: operand 4 is their number, or a predicate that ignores the source. None for all."""
    if len(d.operands) == 3:
        return None
    operand = d.operands[3]
    if isinstance(operand, Not) or isinstance(operand, Register) and operand.kind == "pred":
        ignore = d.source(3, "pred")
        return lambda s, lanes: np.where(ignore(s, lanes), np.uint32(0), np.uint32(size))
    return d.source(3, "u32")


def zero_filled(s: State, lanes: Lanes, address: np.ndarray, given: np.ndarray, size: int) -> np.ndarray:
    """The first ``given`` bytes at each address, zeros behind them; nothing else is touched."""
    values = np.zeros((len(address), size), np.uint8)
    numbers = s.numbers(lanes)
    whole = np.flatnonzero(given >= size)
    if len(whole):
        values[whole] = s.memory.load(numbers[whole], address[whole], size).view(np.uint8).reshape(-1, size)
    partial = np.flatnonzero((given > 0) & (given < size))
    if len(partial):
        s.memory.check_alignment(numbers[partial], address[partial], size)
    for byte in range(size if len(partial) else 0):
        here = partial[given[partial] > byte]
        if len(here):
            values[here, byte] = s.memory.load(numbers[here], address[here] + np.uint64(byte), 1)
    return values.view(UNSIGNED[size]).ravel()
