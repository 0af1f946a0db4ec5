"""f16, bf16 and pairs of them. Everything is computed in fp64, rounded to odd where it isn't exact, and rounded once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..decode import Decoder, Step, Values
from ..numerics import (
    QUIET_NAN16,
    bf16_to_f32,
    extremum,
    f32_to_bf16,
    f32_to_f16,
    f64_to_bf16,
    f64_to_f16,
    flushed,
    odd_sum,
    saturated,
)

SMALLEST_NORMAL16 = 2.0**-14
MAGNITUDE, SIGN = {2: np.uint16(0x7FFF), 4: np.uint32(0x7FFF7FFF)}, {2: np.uint16(0x8000), 4: np.uint32(0x80008000)}


def widened(kind: str, ftz: bool) -> Callable[[Values], Values]:
    """Values of a register as floats that numpy compares."""
    if kind == "bf16":
        return bf16_to_f32
    if kind == "f16" and ftz:
        return lambda x: np.where(np.abs(x) < SMALLEST_NORMAL16, np.copysign(np.float16(0), x), x)
    return flushed if ftz and kind == "f32" else lambda x: x


def bits_to_f64(bits: Values, bf: bool, ftz: bool) -> Values:
    """uint16 bits as fp64."""
    if bf:
        return bf16_to_f32(bits).astype(np.float64)
    values = np.asarray(bits).view(np.float16).astype(np.float64)
    return np.where(np.abs(values) < SMALLEST_NORMAL16, np.copysign(0.0, values), values) if ftz else values


def f64_to_bits(values: Values, bf: bool, ftz: bool, sat: bool) -> Values:
    """fp64, exact or rounded to odd, to uint16 bits."""
    if sat:
        values = saturated(values)
    if bf:
        return f64_to_bf16(values)
    if ftz:
        values = np.where(np.abs(values) < SMALLEST_NORMAL16, np.copysign(0.0, values), values)
    return f64_to_f16(values).view(np.uint16)


def packed(kind: str, function: Callable[..., Values]) -> Callable[..., Values]:
    """A function of uint16 bits, for a type that may be a pair of them."""
    if not kind.endswith("x2"):
        return function

    def both(*pairs: Values) -> Values:
        low = function(*[p.astype(np.uint16) for p in pairs])
        high = function(*[(p >> np.uint32(16)).astype(np.uint16) for p in pairs])
        return (np.asarray(high).astype(np.uint32) << np.uint32(16)) | low

    return both


def half_step(d: Decoder, kind: str, exact: Callable[..., Values], operands: int) -> Step:
    """A function of fp64 numbers, on a half type."""
    bf, ftz, sat = kind.startswith("bf"), bool(d.take("ftz")), bool(d.take("sat"))
    relu = bool(d.take("relu"))

    def on_bits(*bits: Values) -> Values:
        result = exact(*[bits_to_f64(b, bf, ftz) for b in bits])
        if relu:
            result = np.where(result <= 0, 0.0, result)
        return f64_to_bits(result, bf, ftz, sat)

    as_bits = "b32" if kind.endswith("x2") else "b16"
    return d.elementwise(packed(kind, on_bits), as_bits, *[as_bits] * operands)


def half_binary(d: Decoder, kind: str, name: str) -> Step:
    """add, sub, mul."""
    d.take("rn")
    exact = {"add": odd_sum, "sub": lambda a, b: odd_sum(a, -b), "mul": np.multiply}[name]
    return half_step(d, kind, exact, 2)


def half_fma(d: Decoder, kind: str) -> Step:
    d.need("rn")
    return half_step(d, kind, lambda a, b, c: odd_sum(a * b, c), 3)


def half_function(d: Decoder, kind: str, function: Callable[[Values], Values]) -> Step:
    """The approximate functions."""
    return half_step(d, kind, function, 1)


def half_extremum(d: Decoder, kind: str) -> Step:
    """min and max; NaN loses unless .NaN."""
    return half_step(d, kind, extremum(d.name == "max", bool(d.take("NaN"))), 2)


def half_sign(d: Decoder, kind: str) -> Step:
    """abs and neg on the bits."""
    d.take("ftz")
    as_bits = "b32" if kind.endswith("x2") else "b16"
    size = 4 if kind.endswith("x2") else 2
    if d.name == "abs":
        return d.elementwise(lambda a: a & MAGNITUDE[size], as_bits, as_bits)
    return d.elementwise(lambda a: a ^ SIGN[size], as_bits, as_bits)


def round_pair(d: Decoder, kind: str, direction: str, relu: bool, sat: bool) -> Step:
    """cvt.f16x2.f32 and cvt.bf16x2.f32: operand 1 becomes the high half, operand 2 the low one."""
    narrow = f32_to_bf16 if kind == "bf16x2" else lambda x, way: f32_to_f16(x, way).view(np.uint16)

    def one(x: Values) -> Values:
        if sat:
            x = saturated(x)
        bits = narrow(np.asarray(x), direction)
        if relu:
            bits = np.where((bits & np.uint16(0x8000) != 0) & (bits != QUIET_NAN16), np.uint16(0), bits)
        return bits.astype(np.uint32)

    return d.elementwise(lambda high, low: (one(high) << np.uint32(16)) | one(low), "b32", "f32", "f32")
