"""Integers: arithmetic, shifts, bit fields, bytes. Add, mul and their kin pass floats on to their rooms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..decode import Decoder, Get, Step, Values, instruction
from ..memory import Lanes
from ..state import State
from ..types import SIZE, WIDER, dtype_of, is_float
from . import floating, half

UNSIGNED_OF = {"s16": "u16", "s32": "u32", "s64": "u64"}


def float_kind(d: Decoder) -> str:
    """The type where it is a float's."""
    kind = d.modifiers[-1] if d.modifiers else ""
    return d.modifiers.pop() if kind in SIZE and is_float(kind) else ""


@instruction("add", "sub")
def add(d: Decoder) -> Step:
    if kind := float_kind(d):
        return floating.floating_add(d, kind, d.name == "sub") if kind in ("f32", "f64") else half.half_binary(d, kind, d.name)
    kind = d.kind()
    if d.take("cc"):
        return with_carry(d, kind, carry_in=False)
    if d.take("sat"):
        return saturating(d, kind)
    return d.elementwise(np.add if d.name == "add" else np.subtract, kind, kind, kind)


def saturating(d: Decoder, kind: str) -> Step:
    if kind != "s32":
        raise d.unsupported()
    combine = np.add if d.name == "add" else np.subtract
    wide = np.int64
    return d.elementwise(
        lambda a, b: np.clip(combine(a.astype(wide), b.astype(wide)), -(2**31), 2**31 - 1).astype(np.int32), kind, kind, kind
    )


@instruction("addc", "subc", "madc")
def add_with_carry(d: Decoder) -> Step:
    kind = d.kind("u32", "s32", "u64", "s64")
    return with_carry(d, kind, carry_in=True)


def with_carry(d: Decoder, kind: str, carry_in: bool) -> Step:
    """The carry flag, which subtractions use as a borrow, lives in the state; .cc sets it."""
    sets = bool(d.take("cc")) or not carry_in
    fused = d.name.startswith("mad")
    d.arity(4 if fused else 3)
    bits = f"u{8 * SIZE[kind]}"
    first = product_part(d, kind) if fused else d.source(1, bits)
    last, put = d.source(3 if fused else 2, bits), d.target(0, bits)
    subtract = d.name.startswith("sub")
    dtype = dtype_of(bits)

    def step(s: State, lanes: Lanes) -> None:
        x, y = first(s, lanes), last(s, lanes)
        where = ... if lanes is None else lanes
        carry = s.carry[where].astype(dtype) if carry_in else dtype.type(0)
        partial = x - y if subtract else x + y
        total = partial - carry if subtract else partial + carry
        if sets:
            s.carry[where] = ((x < y) | (partial < carry)) if subtract else ((partial < x) | (total < partial))
        put(s, lanes, total)

    return step


def product_part(d: Decoder, kind: str) -> Get:
    """The half of operand 1 times operand 2 that the statement names, as unsigned bits."""
    half_of = np.multiply if d.need("lo", "hi") == "lo" else high_half(kind)
    a, b = d.source(1, kind), d.source(2, kind)
    unsigned = dtype_of(f"u{8 * SIZE[kind]}")
    return lambda s, lanes: half_of(a(s, lanes), b(s, lanes)).view(unsigned)


@instruction("mul", "mad")
def multiply(d: Decoder) -> Step:
    fused = d.name == "mad"
    if kind := float_kind(d):
        if kind not in ("f32", "f64"):
            return half.half_binary(d, kind, "mul")
        return floating.floating_fma(d, kind) if fused else floating.floating_multiply(d, kind)
    kind = d.kind("u16", "s16", "u32", "s32", "u64", "s64")
    if fused and d.take("cc"):
        return with_carry(d, kind, carry_in=False)
    part = d.need("lo", "hi", "wide")
    if part == "lo" and not fused:
        return d.elementwise(np.multiply, kind, kind, kind)
    if part == "lo":
        return d.elementwise(lambda a, b, c: a * b + c, kind, kind, kind, kind)
    if part == "wide":
        if kind in ("u64", "s64"):
            raise d.unsupported()
        wide = WIDER[kind]
        product = widening(dtype_of(wide))
        if fused:
            return d.elementwise(lambda a, b, c: product(a, b) + c, wide, kind, kind, wide)
        return d.elementwise(product, wide, kind, kind)
    high = high_half(kind)
    if fused:
        return d.elementwise(lambda a, b, c: high(a, b) + c, kind, kind, kind, kind)
    return d.elementwise(high, kind, kind, kind)


def widening(wide: np.dtype) -> Callable[[Values, Values], Values]:
    return lambda a, b: np.multiply(a, b, dtype=wide)


def high_half(kind: str) -> Callable[[Values, Values], Values]:
    """The upper half of the double-width product."""
    dtype = dtype_of(kind)
    if kind in WIDER:
        wide, shift = dtype_of(WIDER[kind]), 8 * dtype.itemsize
        return lambda a, b: (np.multiply(a, b, dtype=wide) >> wide.type(shift)).astype(dtype)
    half32, mask = np.uint64(32), np.uint64(0xFFFFFFFF)

    def unsigned(a: Values, b: Values) -> Values:
        low = (a & mask) * (b & mask)
        middle = (a >> half32) * (b & mask) + (low >> half32)
        other = (a & mask) * (b >> half32) + (middle & mask)
        return (a >> half32) * (b >> half32) + (middle >> half32) + (other >> half32)

    def signed(a: Values, b: Values) -> Values:
        x, y = a.view(np.uint64), b.view(np.uint64)
        high = unsigned(x, y) - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
        return np.asarray(high).view(np.int64)

    return unsigned if kind == "u64" else signed


@instruction("mul24", "mad24")
def multiply24(d: Decoder) -> Step:
    kind = d.kind("u32", "s32")
    part = d.need("lo", "hi")
    shift = np.int64(0 if part == "lo" else 16)

    def low24(a: Values) -> Values:
        wide = a.astype(np.int64) & 0xFFFFFF
        return (wide ^ 0x800000) - 0x800000 if kind == "s32" else wide

    def product(a: Values, b: Values) -> Values:
        return ((low24(a) * low24(b)) >> shift).astype(dtype_of(kind))

    if d.name == "mad24":
        return d.elementwise(lambda a, b, c: product(a, b) + c, kind, kind, kind, kind)
    return d.elementwise(product, kind, kind, kind)


@instruction("div", "rem")
def divide(d: Decoder) -> Step:
    """Truncated; by zero all bits are one, the remainder the dividend, as GPUs have it."""
    if kind := float_kind(d):
        return floating.floating_divide(d, kind)
    kind = d.kind("u16", "s16", "u32", "s32", "u64", "s64")
    remainder, dtype = d.name == "rem", dtype_of(kind)

    def step(a: Values, b: Values) -> Values:
        by_zero = b == 0
        safe = np.where(by_zero, dtype.type(1), b)
        if kind[0] == "u":
            result = a % safe if remainder else a // safe
        else:
            unsigned = dtype_of(UNSIGNED_OF[kind])
            x, y = magnitude(a, unsigned), magnitude(safe, unsigned)
            bits = x % y if remainder else x // y
            negative = a < 0 if remainder else (a < 0) != (safe < 0)
            result = np.where(negative, unsigned.type(0) - bits, bits).view(dtype)
        return np.where(by_zero, a if remainder else np.array(-1).astype(dtype), result)

    return d.elementwise(step, kind, kind, kind)


def magnitude(a: Values, unsigned: np.dtype) -> Values:
    """|a| as unsigned: the most negative number has one there."""
    bits = a.view(unsigned)
    return np.where(a < 0, unsigned.type(0) - bits, bits)


@instruction("min", "max")
def extremum(d: Decoder) -> Step:
    if kind := float_kind(d):
        return floating.floating_extremum(d, kind) if kind in ("f32", "f64") else half.half_extremum(d, kind)
    kind = d.kind("u16", "s16", "u32", "s32", "u64", "s64")
    return d.elementwise(np.minimum if d.name == "min" else np.maximum, kind, kind, kind)


@instruction("abs", "neg")
def sign(d: Decoder) -> Step:
    if kind := float_kind(d):
        return floating.floating_sign(d, kind) if kind in ("f32", "f64") else half.half_sign(d, kind)
    kind = d.kind("s16", "s32", "s64")
    return d.elementwise(np.abs if d.name == "abs" else np.negative, kind, kind)


@instruction("and", "or", "xor")
def logic(d: Decoder) -> Step:
    kind = d.kind("pred", "b16", "b32", "b64")
    return d.elementwise({"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[d.name], kind, kind, kind)


@instruction("not")
def invert(d: Decoder) -> Step:
    kind = d.kind("pred", "b16", "b32", "b64")
    return d.elementwise(np.invert, kind, kind)


@instruction("cnot")
def c_not(d: Decoder) -> Step:
    kind = d.kind("b16", "b32", "b64")
    return d.elementwise(lambda a: (a == 0).astype(a.dtype), kind, kind)


@instruction("shl", "shr")
def shift(d: Decoder) -> Step:
    """A count beyond the width shifts everything out."""
    kind = d.kind("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64")
    dtype, width = dtype_of(kind), np.uint32(8 * SIZE[kind])
    if d.name == "shl":
        shifted, rest = np.left_shift, lambda a: dtype.type(0)
    else:
        shifted, rest = np.right_shift, lambda a: a >> dtype.type(width - 1) if kind[0] == "s" else dtype.type(0)

    def step(a: Values, count: Values) -> Values:
        beyond = count >= width
        if not np.any(beyond):
            return shifted(a, count.astype(dtype))
        return np.where(beyond, rest(a), shifted(a, np.where(beyond, 0, count).astype(dtype)))

    return d.elementwise(step, kind, kind, "u32")
