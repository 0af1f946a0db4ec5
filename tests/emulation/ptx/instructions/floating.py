"""Arithmetic on f32 and f64; f16 and bf16 have a room of their own, half.py."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from ..decode import Decoder, Step, Values, instruction
from ..numerics import (
    QUIET_NAN32,
    extremum,
    flushed,
    fma32,
    odd_sum,
    product32,
    saturated,
    signed_zero_sum,
    toward,
)
from .half import half_fma, half_function

ROUNDINGS = ("rn", "rz", "rm", "rp")


def rounding(d: Decoder) -> str:
    """The direction that the statement asks for; the nearest where none."""
    return d.take(*ROUNDINGS) or "rn"


def finished(d: Decoder, kind: str, function: Callable[..., Values], operands: int) -> Step:
    """With .ftz and .sat around a function. NaN results of f32 become the GPU's."""
    ftz, sat = bool(d.take("ftz")), bool(d.take("sat"))
    if kind == "f64":
        return d.elementwise(function, kind, *[kind] * operands)

    def step(*arguments: Values) -> Values:
        result = function(*map(flushed, arguments)) if ftz else function(*arguments)
        if ftz:
            result = flushed(result)
        return saturated(result) if sat else canonical32(result)

    return d.elementwise(step, kind, *[kind] * operands)


def canonical32(x: Values) -> Values:
    """x with every NaN as 0x7fffffff."""
    nan = x != x
    if not np.any(nan):
        return x
    return np.where(nan, QUIET_NAN32, x.view(np.uint32)).view(np.float32)


def floating_add(d: Decoder, kind: str, negate: bool) -> Step:
    """add and sub of f32 and f64."""
    direction = rounding(d)
    nearest = np.subtract if negate else np.add
    if direction == "rn":
        return finished(d, kind, nearest, 2)
    if kind == "f64":
        raise d.unsupported("directed rounding of f64")

    def directed(a: Values, b: Values) -> Values:
        b = -b if negate else b
        return signed_zero_sum(toward(odd_sum(a.astype(np.float64), b.astype(np.float64)), direction), a, b, direction)

    return finished(d, kind, directed, 2)


def floating_multiply(d: Decoder, kind: str) -> Step:
    """mul of f32 and f64."""
    direction = rounding(d)
    if direction == "rn":
        return finished(d, kind, np.multiply, 2)
    if kind == "f64":
        raise d.unsupported("directed rounding of f64")
    return finished(d, kind, lambda a, b: toward(product32(a, b), direction), 2)


@instruction("fma")
def fused(d: Decoder) -> Step:
    kind = d.kind("f32", "f64", "f16", "bf16", "f16x2", "bf16x2")
    if kind not in ("f32", "f64"):
        return half_fma(d, kind)
    return floating_fma(d, kind)


def floating_fma(d: Decoder, kind: str) -> Step:
    """fma, and mad of floats, which is the same from sm_20 on."""
    direction = rounding(d)
    if kind == "f64":
        if direction != "rn":
            raise d.unsupported("directed rounding of f64")
        return finished(d, kind, fma64, 3)
    if direction == "rn":
        return finished(d, kind, fma32, 3)

    def directed(a: Values, b: Values, c: Values) -> Values:
        product, c = product32(a, b), c.astype(np.float64)
        return signed_zero_sum(toward(odd_sum(product, c), direction), product, c, direction)

    return finished(d, kind, directed, 3)


_libm = ctypes.CDLL("libm.so.6")
_libm.fma.argtypes, _libm.fma.restype = [ctypes.c_double] * 3, ctypes.c_double
_fma64 = np.frompyfunc(_libm.fma, 3, 1)


def fma64(a: Values, b: Values, c: Values) -> Values:
    """fp64 a*b + c, rounded once, by the C library."""
    return np.asarray(_fma64(a, b, c), np.float64)


def floating_divide(d: Decoder, kind: str) -> Step:
    """The approximate divisions are rounded as the exact one."""
    direction = rounding(d) if not d.take("approx", "full") else "rn"
    if direction == "rn":
        return finished(d, kind, np.divide, 2)
    if kind == "f64":
        raise d.unsupported("directed rounding of f64")
    return finished(d, kind, lambda a, b: toward(quotient(a, b), direction), 2)


def quotient(a: Values, b: Values) -> Values:
    """fp32 a/b in fp64, rounded to odd."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    rough = np.asarray(a / b)
    error = fma64(-rough, b, a)  # the remainder, exact
    bits = rough.view(np.int64)
    inexact = (error != 0) & np.isfinite(rough) & np.isfinite(b) & ((bits & 1) == 0)
    away = ((error > 0) == (b > 0)) == (rough > 0)
    return np.where(inexact, bits + np.where(away, 1, -1), bits).view(np.float64)


def root(a: Values) -> Values:
    """fp32's square root in fp64, rounded to odd."""
    a = a.astype(np.float64)
    rough = np.asarray(np.sqrt(a))
    error = fma64(-rough, rough, a)
    bits = rough.view(np.int64)
    inexact = (error != 0) & np.isfinite(rough) & ((bits & 1) == 0)
    return np.where(inexact, bits + np.where(error > 0, 1, -1), bits).view(np.float64)


@instruction("rcp", "sqrt")
def unary_rounded(d: Decoder) -> Step:
    kind = d.kind("f32", "f64")
    direction = rounding(d) if not d.take("approx") else "rn"
    if direction == "rn":
        function = np.sqrt if d.name == "sqrt" else np.reciprocal
        return finished(d, kind, function, 1)
    if kind == "f64":
        raise d.unsupported("directed rounding of f64")
    if d.name == "sqrt":
        return finished(d, kind, lambda a: toward(root(a), direction), 1)
    return finished(d, kind, lambda a: toward(quotient(np.ones_like(a), a), direction), 1)


APPROXIMATE = {
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@instruction(*APPROXIMATE)
def approximate(d: Decoder) -> Step:
    """Rounded to the nearest, which a GPU doesn't promise: it stays within a few units of the last place."""
    kind = d.kind("f32", "f64", "f16", "f16x2", "bf16", "bf16x2")
    d.need("approx")
    exact = APPROXIMATE[d.name]
    if kind not in ("f32", "f64"):
        return half_function(d, kind, exact)
    if kind == "f64":
        return finished(d, kind, exact, 1)
    return finished(d, kind, lambda x: np.asarray(exact(x.astype(np.float64))).astype(np.float32), 1)


def floating_extremum(d: Decoder, kind: str) -> Step:
    """min and max of f32 and f64."""
    propagate, magnitude = bool(d.take("NaN")), bool(d.take("xorsign"))
    if magnitude:
        raise d.unsupported()
    return finished(d, kind, extremum(d.name == "max", propagate), 2)


def floating_sign(d: Decoder, kind: str) -> Step:
    """abs and neg, which touch only the sign."""
    ftz = bool(d.take("ftz"))
    plain = np.abs if d.name == "abs" else np.negative
    return d.elementwise((lambda x: plain(flushed(x))) if ftz else plain, kind, kind)


@instruction("copysign")
def copy_sign(d: Decoder) -> Step:
    kind = d.kind("f32", "f64")
    return d.elementwise(lambda sign, magnitude: np.copysign(magnitude, sign), kind, kind, kind)


@instruction("testp")
def has_property(d: Decoder) -> Step:
    kind = d.kind("f32", "f64")
    smallest = np.finfo(np.float32 if kind == "f32" else np.float64).tiny
    tests = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= smallest),
        "subnormal": lambda x: (np.abs(x) < smallest) & (x != 0),
    }
    return d.elementwise(tests[d.need(*tests)], "pred", kind)
