"""Threads of a warp look at each other: shfl, vote, match, redux, elect, activemask. The scheduler waits for a mask's members."""

from __future__ import annotations

import numpy as np

from ..decode import Collective, Decoder, Get, Step, Values, instruction
from ..memory import Lanes
from ..state import State, warp_bits
from ..types import dtype_of

U32 = np.uint32


def spread(s: State, lanes: Lanes, values: Values, dtype: np.dtype) -> np.ndarray:
    """Values of the active lanes as (warps, 32), zero where a lane isn't active."""
    whole = np.zeros(s.lanes, dtype)
    whole[... if lanes is None else lanes] = values
    return whole.reshape(-1, 32)


@instruction("shfl")
def shuffle(d: Decoder) -> Collective:
    d.need("sync")
    mode = d.need("up", "down", "bfly", "idx")
    d.kind("b32")
    d.arity(5)
    result, valid = d.pair(0)
    put, put_valid = d.target(result, "b32"), d.target(valid, "pred")
    value, operand, clamp, mask = (d.source(n, "u32") for n in range(1, 5))

    def step(s: State, lanes: Lanes) -> None:
        numbers = s.numbers(lanes)
        lane = numbers & 31
        b = (operand(s, lanes) & U32(31)).astype(np.int64)
        c = clamp(s, lanes).astype(np.int64)
        segment, limit = (c >> 8) & 31, c & 31
        highest = (lane & segment) | (limit & ~segment & 31)
        lowest = lane & segment
        if mode == "up":
            source = lane - b
            inside = source >= highest
        elif mode == "down":
            source = lane + b
            inside = source <= highest
        elif mode == "bfly":
            source = lane ^ b
            inside = source <= highest
        else:
            source = lowest | (b & ~segment)
            inside = source <= highest
        source = np.where(inside, source, lane) + (numbers - lane)
        values = value(s, lanes)
        if lanes is None:
            moved = np.broadcast_to(values, source.shape)[source]
        else:
            moved = spread(s, lanes, values, np.dtype(U32)).ravel()[source]
        put(s, lanes, moved)
        put_valid(s, lanes, inside)

    return Collective(step, mask)


@instruction("vote")
def vote(d: Decoder) -> Collective:
    d.need("sync")
    mode = d.need("all", "any", "uni", "ballot")
    result = d.kind("pred", "b32")
    d.arity(3)
    put, predicate, mask = d.target(0, result), d.source(1, "pred"), d.source(2, "u32")

    def step(s: State, lanes: Lanes) -> None:
        yes = np.flatnonzero(spread(s, lanes, predicate(s, lanes), np.dtype(np.bool_)))
        members = np.broadcast_to(mask(s, lanes), s.count(lanes)) & warp_bits(s, s.numbers(lanes), s.numbers(lanes))
        ballot = warp_bits(s, yes, s.numbers(lanes)) & members
        if mode == "ballot":
            put(s, lanes, ballot)
        elif mode == "any":
            put(s, lanes, ballot != 0)
        else:
            put(s, lanes, (ballot == members) | ((ballot == 0) & (mode == "uni")))

    return Collective(step, mask)


@instruction("match")
def match(d: Decoder) -> Collective:
    mode = d.need("any", "all")
    d.need("sync")
    kind = d.kind("b32", "b64")
    d.arity(3)
    result, same = d.pair(0)
    put, put_same = d.target(result, "b32"), d.target(same, "pred")
    value, mask = d.source(1, kind), d.source(2, "u32")

    def step(s: State, lanes: Lanes) -> None:
        numbers = s.numbers(lanes)
        values = spread(s, lanes, value(s, lanes), dtype_of(kind))
        equal = values[:, :, None] == values[:, None, :]  # (warps, 32, 32)
        bits = np.packbits(equal, axis=2, bitorder="little").view(U32).reshape(-1)[numbers]
        members = np.broadcast_to(mask(s, lanes), len(numbers)) & warp_bits(s, numbers, numbers)
        bits = bits & members
        if mode == "any":
            put(s, lanes, bits)
        else:
            put(s, lanes, np.where(bits == members, members, U32(0)))
            put_same(s, lanes, bits == members)

    return Collective(step, mask)


@instruction("redux")
def reduce(d: Decoder) -> Collective:
    d.need("sync")
    operation = d.need("add", "min", "max", "and", "or", "xor")
    kind = d.kind("u32", "s32", "b32")
    d.arity(3)
    put, value, mask = d.target(0, kind), d.source(1, kind), d.source(2, "u32")
    ufunc = {
        "add": np.add, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[operation]  # fmt: skip

    def step(s: State, lanes: Lanes) -> None:
        numbers = s.numbers(lanes)
        members = np.broadcast_to(mask(s, lanes), len(numbers)) & warp_bits(s, numbers, numbers)
        key = (numbers >> 5) * (1 << 32) + members  # lanes of one warp and one mask
        _, group = np.unique(key, return_inverse=True)
        order = np.argsort(group, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(group[order]) != 0])
        values = np.broadcast_to(value(s, lanes), len(numbers))
        put(s, lanes, ufunc.reduceat(values[order], starts).astype(values.dtype)[group])

    return Collective(step, mask)


@instruction("elect")
def elect(d: Decoder) -> Collective:
    """The lowest of the members leads."""
    d.need("sync")
    d.arity(2)
    result, leads = d.pair(0)
    put, put_leads, mask = d.target(result, "b32"), d.target(leads, "pred"), d.source(1, "u32")

    def step(s: State, lanes: Lanes) -> None:
        numbers = s.numbers(lanes)
        members = np.broadcast_to(mask(s, lanes), len(numbers)) & warp_bits(s, numbers, numbers)
        lowest = np.bitwise_count((members & (~members + U32(1))) - U32(1)).astype(U32)
        put(s, lanes, lowest)
        put_leads(s, lanes, lowest == (numbers & 31))

    return Collective(step, mask)


@instruction("activemask")
def active_mask(d: Decoder) -> Step:
    """The lanes that happen to run together."""
    d.kind("b32")
    put: Get = d.target(0, "b32")
    return lambda s, lanes: put(s, lanes, warp_bits(s, s.numbers(lanes), s.numbers(lanes)))
