"""Floating point with one rounding, in every direction, for the types that numpy lacks or rounds twice.

The tool: a result is first rounded to odd in fp64 (a sum that isn't exact ends in a one bit). Such a number is on the right
side of every midpoint of a format with at most 51 bits, so that the second rounding is the only one that counts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decode import Values

SMALLEST_NORMAL32 = np.float32(2.0**-126)
QUIET_NAN32 = np.uint32(0x7FFFFFFF)  # what arithmetic gives on a GPU
QUIET_NAN16 = np.uint16(0x7FFF)
TIE = np.int64(1 << 28)  # the low 29 bits of an fp64 fraction that lies between two fp32 numbers
BELOW32 = np.int64((1 << 29) - 1)


def flushed(x: Values) -> Values:
    """fp32 with denormals as zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL32, np.copysign(np.float32(0), x), x)


def saturated(x: Values) -> Values:
    """Clamped to [0, 1]; NaN becomes 0."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, x.dtype.type(0), x.dtype.type(1)) + x.dtype.type(0))


def odd_sum(a: Values, b: Values) -> Values:
    """a + b of fp64, rounded to odd."""
    total = np.asarray(a + b, np.float64)
    part = total - a
    error = (a - (total - part)) + (b - part)
    bits = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(total) & ((bits & 1) == 0)
    away = (error > 0) == (total > 0)  # the exact sum is larger in magnitude than the rounded
    return np.where(inexact, bits + np.where(away, 1, -1), bits).view(np.float64)


def product32(a: Values, b: Values) -> Values:
    """Exact, in fp64."""
    return np.multiply(a, b, dtype=np.float64)


def fma32(a: Values, b: Values, c: Values) -> Values:
    """fp32 a*b + c, rounded once to the nearest."""
    product = np.multiply(a, b, dtype=np.float64)
    total = np.add(product, c, dtype=np.float64)
    result = total.astype(np.float32)
    # Only a total that fp64 rounded onto a midpoint of fp32 can round twice, or one below fp32's normal numbers.
    doubtful = (total.view(np.int64) & BELOW32) == TIE
    doubtful |= np.abs(total) < 2.0**-125
    if doubtful.any():
        c = np.asarray(c, np.float64)
        if result.ndim == 0:
            return odd_sum(product, c).astype(np.float32)[()]
        at = np.flatnonzero(doubtful)
        product, c = np.broadcast_to(product, result.shape)[at], np.broadcast_to(c, result.shape)[at]
        result[at] = odd_sum(product, c).astype(np.float32)
    return result


def toward(exact: Values, direction: str, dtype: type = np.float32) -> Values:
    """fp64 (exact or rounded to odd) to fp32 in a direction: rn, rz, rm, rp."""
    exact = np.asarray(exact, np.float64)
    nearest = exact.astype(dtype)
    if direction == "rn":
        return nearest
    low, high = np.nextafter(nearest, dtype(-np.inf)), np.nextafter(nearest, dtype(np.inf))
    down = np.where(nearest > exact, low, nearest)
    up = np.where(nearest < exact, high, nearest)
    if direction == "rm":
        return down
    if direction == "rp":
        return up
    return np.copysign(np.where(exact > 0, down, up), nearest)


def signed_zero_sum(result: Values, a: Values, b: Values, direction: str) -> Values:
    """x + -x is -0 where sums round down."""
    if direction != "rm":
        return result
    cancelled = (a + b == 0) & ~((a == 0) & (b == 0) & ~np.signbit(a) & ~np.signbit(b))
    return np.where(cancelled & (result == 0), result.dtype.type(-0.0), result)


# ---- 16 bits ------------------------------------------------------------------------------------------------------------------


def bf16_to_f32(bits: Values) -> Values:
    """uint16 bits of bf16 as fp32."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: Values, direction: str = "rn") -> Values:
    """fp32 to bits of bf16; NaN becomes 0x7fff."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    if direction == "rn":
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    elif direction == "rz":
        rounded = bits >> np.uint32(16)
    else:
        up = (bits & np.uint32(0xFFFF) != 0) & ((bits >> np.uint32(31) == 0) == (direction == "rp"))
        rounded = (bits >> np.uint32(16)) + up
    return np.where(np.isnan(x), QUIET_NAN16, rounded.astype(np.uint16))


def odd32(x: Values) -> Values:
    """fp64 (exact or rounded to odd) to fp32, rounded to odd."""
    down = toward(x, "rz")
    bits = down.view(np.uint32)
    inexact = (down.astype(np.float64) != x) & ~np.isnan(down)
    return np.where(inexact & np.isfinite(down), bits | np.uint32(1), bits).view(np.float32)


def f64_to_bf16(x: Values) -> Values:
    """fp64 (exact or rounded to odd) to the nearest bf16."""
    return f32_to_bf16(odd32(x))


def f64_to_f16(x: Values, direction: str = "rn") -> Values:
    """fp64 (exact or rounded to odd) to fp16; NaN becomes 0x7fff."""
    half = np.asarray(toward(x, direction, np.float16))
    return np.where(np.isnan(half), QUIET_NAN16, half.view(np.uint16)).view(np.float16)


def f32_to_f16(x: Values, direction: str = "rn") -> Values:
    """fp32 to fp16."""
    if direction == "rn":
        half = np.asarray(x.astype(np.float16))
        nan = np.isnan(half)
        return np.where(nan, QUIET_NAN16, half.view(np.uint16)).view(np.float16) if nan.any() else half
    return f64_to_f16(x.astype(np.float64), direction)


# ---- minimum and maximum ------------------------------------------------------------------------------------------------------


def extremum(largest: bool, propagate_nan: bool) -> Callable[[Values, Values], Values]:
    """min or max of floats: NaN loses unless it propagates, -0 < +0."""

    def choose(a: Values, b: Values) -> Values:
        result = (np.fmax if largest else np.fmin)(a, b)
        zeros = (a == 0) & (b == 0)
        if zeros.any():
            sign = (np.signbit(a) & np.signbit(b)) if largest else (np.signbit(a) | np.signbit(b))
            result = np.where(zeros, np.where(sign, result.dtype.type(-0.0), result.dtype.type(0.0)), result)
        nan = np.isnan(a) | np.isnan(b) if propagate_nan else np.isnan(result)
        return np.where(nan, canonical_nan(result.dtype), result) if nan.any() else result

    return choose


def canonical_nan(dtype: np.dtype) -> np.generic:
    """The NaN that a GPU's arithmetic gives."""
    bits = {2: QUIET_NAN16, 4: QUIET_NAN32, 8: np.uint64(0x7FF8000000000000)}[dtype.itemsize]
    return bits.view(dtype)
