"""Bit fields, counts, funnels, bytes."""

from __future__ import annotations

import numpy as np

from ..decode import Decoder, Step, Values, instruction
from ..types import SIZE, dtype_of

U32, U64 = np.uint32, np.uint64


@instruction("shf")
def funnel(d: Decoder) -> Step:
    """32 bits out of b:a."""
    left = d.need("l", "r") == "l"
    wrap = d.need("wrap", "clamp") == "wrap"
    d.kind("b32")

    def step(a: Values, b: Values, count: Values) -> Values:
        count = count & U32(31) if wrap else np.minimum(count, U32(32))
        both = (b.astype(U64) << U64(32)) | a
        if left:
            return ((both << count.astype(U64)) >> U64(32)).astype(U32)
        return (both >> count.astype(U64)).astype(U32)

    return d.elementwise(step, "b32", "b32", "b32", "u32")


@instruction("bfe")
def extract(d: Decoder) -> Step:
    """``length`` bits from ``start`` on; bits beyond the number are its sign's, a length of 0 gives 0."""
    kind = d.kind("u32", "s32", "u64", "s64")
    width, dtype = 8 * SIZE[kind], dtype_of(kind)
    unsigned = dtype_of(f"u{width}")

    def step(a: Values, start: Values, length: Values) -> Values:
        start, length = start & U32(255), length & U32(255)
        bits = np.where(
            start >= width,
            a >> dtype.type(width - 1) if kind[0] == "s" else dtype.type(0),
            a >> np.minimum(start, width - 1).astype(dtype),
        )
        if kind[0] == "s":
            # the field's own top bit, or the number's where the field reaches beyond it
            drop = (width - np.clip(length, 1, width)).astype(dtype)
            field = (bits << drop) >> drop
            return np.where(length == 0, dtype.type(0), field)
        drop = (width - np.clip(length, 1, width)).astype(unsigned)
        return np.where(length == 0, unsigned.type(0), (bits << drop) >> drop)

    return d.elementwise(step, kind, kind, "u32", "u32")


@instruction("bfi")
def insert(d: Decoder) -> Step:
    """The low ``length`` bits of a into b at ``start``."""
    kind = d.kind("b32", "b64")
    width, dtype = 8 * SIZE[kind], dtype_of(kind)

    def step(a: Values, b: Values, start: Values, length: Values) -> Values:
        start, length = start & U32(255), length & U32(255)
        ones = np.where(
            length >= width, ~dtype.type(0), (dtype.type(1) << np.minimum(length, width - 1).astype(dtype)) - dtype.type(1)
        )
        at = np.minimum(start, width - 1).astype(dtype)
        mask = np.where(start >= width, dtype.type(0), ones << at)
        return (b & ~mask) | ((a << at) & mask)

    return d.elementwise(step, kind, kind, kind, "u32", "u32")


@instruction("brev")
def reverse(d: Decoder) -> Step:
    kind = d.kind("b32", "b64")
    dtype = dtype_of(kind)
    swaps = {
        1: 0x5555555555555555, 2: 0x3333333333333333, 4: 0x0F0F0F0F0F0F0F0F,
        8: 0x00FF00FF00FF00FF, 16: 0x0000FFFF0000FFFF, 32: 0x00000000FFFFFFFF,
    }  # fmt: skip

    def step(a: Values) -> Values:
        for distance, pattern in swaps.items():
            if distance < 8 * SIZE[kind]:
                n, mask = dtype.type(distance), dtype.type(pattern & (2 ** (8 * SIZE[kind]) - 1))
                a = ((a >> n) & mask) | ((a & mask) << n)
        return a

    return d.elementwise(step, kind, kind)


@instruction("popc")
def population(d: Decoder) -> Step:
    kind = d.kind("b32", "b64")
    return d.elementwise(lambda a: np.bitwise_count(a).astype(U32), "u32", kind)


def highest_bit(a: Values) -> Values:
    """The position of the highest one (int64), -1 for 0."""
    position = np.full(np.shape(a), -1, np.int64)
    rest = np.asarray(a).astype(U64)
    for step in (32, 16, 8, 4, 2, 1):
        more = rest >= U64(1 << step)
        position += np.where(more, step, 0)
        rest = np.where(more, rest >> U64(step), rest)
    return np.where(rest > 0, position + 1, -1)


@instruction("clz")
def leading_zeros(d: Decoder) -> Step:
    kind = d.kind("b32", "b64")
    width = 8 * SIZE[kind]
    return d.elementwise(lambda a: (width - 1 - highest_bit(a)).astype(U32), "u32", kind)


@instruction("bfind")
def find_highest(d: Decoder) -> Step:
    """The highest bit that differs from the sign; 0xffffffff where none does."""
    kind = d.kind("u32", "s32", "u64", "s64")
    amount = bool(d.take("shiftamt"))
    width = 8 * SIZE[kind]

    def step(a: Values) -> Values:
        bits = np.where(a < 0, ~a, a).astype(dtype_of(f"u{width}"))
        found = highest_bit(bits)
        return np.where(found < 0, -1, width - 1 - found if amount else found).astype(U32)

    return d.elementwise(step, "u32", kind)


@instruction("lop3")
def any_logic(d: Decoder) -> Step:
    """Three inputs through a table of 8 bits."""
    d.kind("b32")
    d.arity(5)
    table = d.constant(4)
    d.operands = d.operands[:4]
    terms = [n for n in range(8) if table >> n & 1]

    def step(a: Values, b: Values, c: Values) -> Values:
        result = np.zeros(np.broadcast(a, b, c).shape, U32)
        for n in terms:
            result |= (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
        return result

    return d.elementwise(step, "b32", "b32", "b32", "b32")


@instruction("prmt")
def permute(d: Decoder) -> Step:
    """Four bytes out of b:a; a selector's top bit spreads the byte's sign."""
    mode = d.take("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    d.kind("b32")
    byte, nibble = U32(0xFF), U32(0xF)

    def step(a: Values, b: Values, select: Values) -> Values:
        both = (b.astype(U64) << U64(32)) | a
        result = np.zeros(np.broadcast(a, b, select).shape, U32)
        for position in range(4):
            if mode:
                which, spread = selected(mode, position, select & U32(3)), None
            else:
                code = (select >> U32(4 * position)) & nibble
                which, spread = code & U32(7), (code & U32(8)) != 0
            value = (both >> (which * U32(8)).astype(U64)).astype(U32) & byte
            if spread is not None and np.any(spread):
                value = np.where(spread, np.where(value & U32(0x80), byte, U32(0)), value)
            result |= value << U32(8 * position)
        return result

    return d.elementwise(step, "b32", "b32", "b32", "u32")


def selected(mode: str, position: int, control: Values) -> Values:
    """Which of the 8 bytes a named mode puts at a position."""
    n = U32(position)
    if mode == "f4e":
        return control + n
    if mode == "b4e":
        return (control - n) & U32(7)
    if mode == "rc8":
        return control
    if mode == "ecl":
        return np.maximum(control, n)
    if mode == "ecr":
        return np.minimum(control, n)
    return (control & U32(1)) * U32(2) + U32(position & 1)


@instruction("sad")
def absolute_difference(d: Decoder) -> Step:
    """c + |a - b|."""
    kind = d.kind("u16", "s16", "u32", "s32", "u64", "s64")
    dtype, unsigned = dtype_of(kind), dtype_of(f"u{8 * SIZE[kind]}")

    def step(a: Values, b: Values, c: Values) -> Values:
        x, y = a.view(unsigned), b.view(unsigned)
        return (c.view(unsigned) + np.where(a < b, y - x, x - y)).view(dtype)

    return d.elementwise(step, kind, kind, kind, kind)


@instruction("dp4a", "dp2a")
def dot_bytes(d: Decoder) -> Step:
    """c plus the dot product of four bytes, or of two halves with two bytes of b."""
    kind_b, kind_a = d.kind("u32", "s32"), d.kind("u32", "s32")
    high = d.name == "dp2a" and d.need("lo", "hi") == "hi"
    result = "s32" if "s32" in (kind_a, kind_b) else "u32"
    width = 8 if d.name == "dp4a" else 16

    def piece(bits: Values, size: int, at: int, signed: bool) -> Values:
        value = (bits.astype(np.int64) >> at) & ((1 << size) - 1)
        return (value ^ (1 << (size - 1))) - (1 << (size - 1)) if signed else value

    def step(a: Values, b: Values, c: Values) -> Values:
        total = c.astype(np.int64)
        for n in range(32 // width):
            first = piece(a, width, width * n, kind_a == "s32")
            second = piece(b, 8, 8 * n + (16 if high else 0), kind_b == "s32")
            total = total + first * second
        return total.astype(dtype_of(result))

    return d.elementwise(step, result, "b32", "b32", result)
