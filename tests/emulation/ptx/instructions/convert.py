"""cvt between every two types."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..decode import Decoder, Step, Values, instruction
from ..numerics import QUIET_NAN16, bf16_to_f32, f32_to_bf16, f32_to_f16, f64_to_f16, flushed, odd32, saturated, toward
from ..types import SIZE, dtype_of, is_float
from .floating import canonical32
from .half import round_pair

TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
DIRECTIONS = ("rn", "rz", "rm", "rp", "rna")
INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")


@instruction("cvt")
def convert(d: Decoder) -> Step:
    source = d.kind(*INTEGERS, "f16", "bf16", "f32", "f64")
    target = d.kind(*INTEGERS, "f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "tf32")
    to_integer = d.take(*TO_INTEGER)
    direction = d.take(*DIRECTIONS)
    ftz, sat, relu = bool(d.take("ftz")), bool(d.take("sat")), bool(d.take("relu"))
    if target in ("f16x2", "bf16x2"):
        d.arity(3)
        if source != "f32" or direction not in ("rn", "rz"):
            raise d.unsupported()
        return round_pair(d, target, direction, relu, sat)
    d.arity(2)
    if target == "tf32":
        if source != "f32" or direction != "rna":
            raise d.unsupported()
        return d.elementwise(to_tf32, "f32", "f32")
    if not is_float(source) and not is_float(target):
        return integers(d, target, source, sat)
    if not is_float(target):
        if to_integer == "":
            raise d.unsupported("a rounding to integers")
        return d.elementwise(float_to_integer(target, source, to_integer, ftz), target, source)
    if not is_float(source):
        if target == "f64" and direction not in ("", "rn"):
            raise d.unsupported("directed rounding of f64")
        return d.elementwise(integer_to_float(target, source, direction or "rn", sat), target, source)
    return d.elementwise(float_to_float(target, source, direction, to_integer, ftz, sat, relu), target, source)


def integers(d: Decoder, target: str, source: str, sat: bool) -> Step:
    """Sign or zero extension, low bits, or the nearest number that there is."""
    dtype = dtype_of(target)
    put, get = d.target(0, target), d.source(1, source)
    if not sat:
        return lambda s, lanes: put(s, lanes, get(s, lanes).astype(dtype))
    limits = np.iinfo(dtype)
    own = np.iinfo(dtype_of(source))
    low, high = (dtype_of(source).type(v) for v in (max(limits.min, own.min), min(limits.max, own.max)))
    return lambda s, lanes: put(s, lanes, np.clip(get(s, lanes), low, high).astype(dtype))


def wide(source: str, ftz: bool) -> Callable[[Values], Values]:
    """A float of any type in fp64, exactly."""
    if source == "bf16":
        return lambda x: bf16_to_f32(x).astype(np.float64)
    if source == "f32" and ftz:
        return lambda x: flushed(x).astype(np.float64)
    return lambda x: np.asarray(x).astype(np.float64)


def float_to_integer(target: str, source: str, mode: str, ftz: bool) -> Callable[[Values], Values]:
    """Clamped to the range; NaN becomes 0, of 64 bits 0x8000000000000000."""
    dtype, limits = dtype_of(target), np.iinfo(dtype_of(target))
    widen, rounded = wide(source, ftz), TO_INTEGER[mode]
    nan = dtype.type(0) if SIZE[target] < 8 else np.array(1 << 63, np.uint64).view(dtype)[()]

    def step(x: Values) -> Values:
        whole = rounded(widen(x))
        too_low, too_high = whole <= float(limits.min), whole >= float(limits.max)
        inside = np.where(too_low | too_high | np.isnan(whole), 0.0, whole)
        result = inside.astype(np.int64).astype(dtype) if limits.max < 2**63 else inside.astype(dtype)
        result = np.where(too_low, dtype.type(limits.min), np.where(too_high, dtype.type(limits.max), result))
        return np.where(np.isnan(whole), nan, result)

    return step


def odd64(x: Values) -> Values:
    """64-bit integers in fp64, rounded to odd: the bits that don't fit are gathered in the last one that does."""
    unsigned = x.dtype.kind == "u"
    negative = np.zeros(np.shape(x), np.bool_) if unsigned else x < 0
    bits = x.view(np.uint64)
    magnitude = np.where(negative, np.uint64(0) - bits, bits)
    low = magnitude & np.uint64(0x7FF)
    gathered = np.where(
        magnitude >> np.uint64(53) != 0, (magnitude - low) | ((low != 0).astype(np.uint64) << np.uint64(11)), magnitude
    )
    values = gathered.astype(np.float64)
    return np.where(negative, -values, values)


def integer_to_float(target: str, source: str, direction: str, sat: bool) -> Callable[[Values], Values]:
    def step(x: Values) -> Values:
        x = np.asarray(x)
        if target == "f64":
            result = x.astype(np.float64)
            return saturated(result) if sat else result
        exact = odd64(x) if SIZE[source] == 8 else x.astype(np.float64)
        if sat:
            exact = saturated(exact)
        if target == "f32":
            return toward(exact, direction)
        if target == "f16":
            return f64_to_f16(exact, direction)
        return f32_to_bf16(odd32(exact), direction)

    return step


def float_to_float(
    target: str, source: str, direction: str, to_integer: str, ftz: bool, sat: bool, relu: bool
) -> Callable[[Values], Values]:
    """One rounding, to the target's numbers or, with an i behind the direction, to integers of the target's type."""
    widen = wide(source, ftz)
    if target == "f32" and source in ("f16", "bf16") and not (to_integer or sat or ftz):
        return bf16_to_f32 if source == "bf16" else lambda x: np.asarray(x).astype(np.float32)

    def step(x: Values) -> Values:
        if source == "f32" and target in ("f16", "bf16") and not (sat or to_integer):
            x = flushed(x) if ftz else np.asarray(x)
            bits = f32_to_f16(x, direction).view(np.uint16) if target == "f16" else f32_to_bf16(x, direction)
            if relu:
                bits = np.where((bits & np.uint16(0x8000) != 0) & (bits != QUIET_NAN16), np.uint16(0), bits)
            return bits.view(np.float16) if target == "f16" else bits
        value = widen(x)
        if to_integer:
            value = TO_INTEGER[to_integer](value)
        if sat:
            value = saturated(value)
        if target == "f64":
            return value
        if target == "f16":
            return f64_to_f16(value, direction or "rn")
        if target == "bf16":
            return f32_to_bf16(odd32(value), direction or "rn")
        result = canonical32(np.asarray(toward(value, direction or "rn")))
        return flushed(result) if ftz else result

    return step


def to_tf32(x: Values) -> Values:
    """10 bits of fraction, the nearest, ties away from zero."""
    bits = np.asarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, bits & np.uint32(0xFFFFE000)).view(np.float32)
