"""IEEE arithmetic by definition: bits to fractions, exact results, one rounding. Knows nothing of numpy or of the emulator."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import isqrt

INFINITE, NAN = "infinite", "nan"
Number = Fraction | str


@dataclass(frozen=True)
class Format:
    """A sign, ``exponent`` and ``fraction`` bits."""

    exponent: int
    fraction: int

    @property
    def width(self) -> int:
        return 1 + self.exponent + self.fraction

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent) - 1) << self.fraction

    @property
    def nan(self) -> int:
        return self.infinity | (1 << self.fraction) - 1

    def value(self, bits: int) -> Number:
        """Of the magnitude with its sign; the sign of zero and infinity is in the bits."""
        exponent, fraction = bits >> self.fraction & (1 << self.exponent) - 1, bits & (1 << self.fraction) - 1
        if exponent == (1 << self.exponent) - 1:
            return NAN if fraction else INFINITE
        if exponent:
            magnitude = Fraction((1 << self.fraction) + fraction) * Fraction(2) ** (exponent - self.bias - self.fraction)
        else:
            magnitude = Fraction(fraction) * Fraction(2) ** (1 - self.bias - self.fraction)
        return -magnitude if self.negative(bits) else magnitude

    def negative(self, bits: int) -> bool:
        return bool(bits >> (self.width - 1) & 1)

    def signed(self, magnitude: int, negative: bool) -> int:
        return magnitude | int(negative) << (self.width - 1)

    def round(self, value: Fraction, direction: str = "rn", negative_zero: bool = False) -> int:
        """The bits of the number next to value in a direction."""
        if value == 0:
            return self.signed(0, negative_zero)
        negative, magnitude = value < 0, abs(value)
        exponent = max(floor_log2(magnitude), 1 - self.bias)
        scaled = magnitude / Fraction(2) ** (exponent - self.fraction)
        whole, rest = scaled.numerator // scaled.denominator, scaled - scaled.numerator // scaled.denominator
        up = {
            "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole & 1),
            "rna": rest >= Fraction(1, 2),
            "rz": False,
            "rm": negative and rest > 0,
            "rp": not negative and rest > 0,
        }[direction]
        whole += bool(up)
        bits = whole + ((exponent + self.bias - 1) << self.fraction)  # a carry runs into the exponent by itself
        if bits >= self.infinity:
            stays = direction == "rz" or direction == "rm" and not negative or direction == "rp" and negative
            bits = self.infinity - 1 if stays else self.infinity
        return self.signed(bits, negative)

    def flush(self, bits: int) -> int:
        """Denormals as zeros."""
        exponent = bits >> self.fraction & (1 << self.exponent) - 1
        return bits if exponent else self.signed(0, self.negative(bits))


F16, BF16, F32, F64, TF32 = Format(5, 10), Format(8, 7), Format(8, 23), Format(11, 52), Format(8, 10)
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}


def floor_log2(value: Fraction) -> int:
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= value else exponent - 1


def multiply(f: Format, a: int, b: int, direction: str = "rn") -> int:
    x, y, negative = f.value(a), f.value(b), f.negative(a) != f.negative(b)
    if NAN in (x, y) or (INFINITE in (x, y) and 0 in (x, y)):
        return f.nan
    if INFINITE in (x, y):
        return f.signed(f.infinity, negative)
    return f.round(x * y, direction, negative)


def fma(f: Format, a: int, b: int, c: int, direction: str = "rn") -> int:
    x, y, z, negative = f.value(a), f.value(b), f.value(c), f.negative(a) != f.negative(b)
    if NAN in (x, y, z) or (INFINITE in (x, y) and 0 in (x, y)):
        return f.nan
    if INFINITE in (x, y):
        return f.nan if z == INFINITE and f.negative(c) != negative else f.signed(f.infinity, negative)
    if z == INFINITE:
        return c
    both_zero = x * y == 0 and z == 0
    agree = negative == f.negative(c)
    return f.round(x * y + z, direction, negative if both_zero and agree else direction == "rm")


def one(f: Format) -> int:
    return f.bias << f.fraction


def add(f: Format, a: int, b: int, direction: str = "rn") -> int:
    return fma(f, a, one(f), b, direction)


def negate(f: Format, a: int) -> int:
    return a ^ 1 << (f.width - 1)


def subtract(f: Format, a: int, b: int, direction: str = "rn") -> int:
    return add(f, a, negate(f, b), direction)


def divide(f: Format, a: int, b: int, direction: str = "rn") -> int:
    x, y, negative = f.value(a), f.value(b), f.negative(a) != f.negative(b)
    if NAN in (x, y) or x == y == INFINITE or x == y == 0:
        return f.nan
    if x == INFINITE or y == 0:
        return f.signed(f.infinity, negative)
    if y == INFINITE:
        return f.signed(0, negative)
    return f.round(x / y, direction, negative)


def square_root(f: Format, a: int, direction: str = "rn") -> int:
    x = f.value(a)
    if x == NAN or (f.negative(a) and x != 0):
        return f.nan
    if x in (0, INFINITE):
        return a
    scale = 4**200  # 200 bits behind the point, and a sticky one
    whole = isqrt(x.numerator * scale // x.denominator)
    exact = whole * whole * x.denominator == x.numerator * scale
    return f.round(Fraction(2 * whole + (not exact), 2 * 2**200), direction)


def extremum(f: Format, a: int, b: int, largest: bool, propagate: bool = False) -> int:
    """-0 < +0; NaN loses unless it propagates."""
    x, y = f.value(a), f.value(b)
    if x == NAN or y == NAN:
        return f.nan if propagate or x == y else (b if x == NAN else a)
    return max(a, b, key=lambda bits: order(f, bits)) if largest else min(a, b, key=lambda bits: order(f, bits))


def order(f: Format, bits: int) -> tuple[int, Fraction, bool]:
    value = f.value(bits)
    infinite = (-1 if f.negative(bits) else 1) if value == INFINITE else 0
    return infinite, Fraction(0) if value == INFINITE else value, not f.negative(bits)


def compare(f: Format, word: str, a: int, b: int) -> bool:
    x, y = f.value(a), f.value(b)
    unordered = NAN in (x, y)
    if word in ("num", "nan"):
        return unordered == (word == "nan")
    if unordered:
        return word.endswith("u")
    left, right = order(f, a)[:2], order(f, b)[:2]
    return {
        "eq": left == right,
        "ne": left != right,
        "lt": left < right,
        "le": left <= right,
        "gt": left > right,
        "ge": left >= right,
    }[word.removesuffix("u")]


def edges(f: Format) -> list[int]:
    """Zeros, the ends of the denormals and of the normals, ones and their neighbours, infinities, NaN; both signs."""
    smallest = 1 << f.fraction
    magnitudes = [
        0,
        1,
        2,
        smallest - 1,
        smallest,
        smallest + 1,
        one(f) - 1,
        one(f),
        one(f) + 1,
        f.infinity - 1,
        f.infinity,
        f.nan,
    ]
    return [f.signed(m, negative) for m in magnitudes for negative in (False, True)]
