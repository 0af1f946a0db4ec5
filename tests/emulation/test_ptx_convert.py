"""cvt of the emulator: between floats by IEEE's definition in fractions, bf16 and f16 also as torch rounds, integers by range."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import product
from math import ceil, floor

import pytest
import torch

from emulation import exact_floats as exact
from emulation.exact_floats import F32, FORMATS, TF32
from emulation.one_instruction import Case, execute, signed, unsigned

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
ROUNDINGS = {"rni": round, "rzi": int, "rmi": floor, "rpi": ceil}


def limits(kind: str) -> tuple[int, int]:
    width = int(kind[1:])
    return (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if kind[0] == "s" else (0, 2**width - 1)


def number(kind: str, bits: int) -> int:
    return signed(bits, int(kind[1:])) if kind[0] == "s" else bits


def integers(kind: str) -> list[int]:
    generator, width = random.Random(0), int(kind[1:])
    edges = [0, 1, 2, 2 ** (width - 1) - 1, 2 ** (width - 1), 2 ** (width - 1) + 1, 2**width - 2, 2**width - 1]
    ties = [v for n in (11, 12, 24, 25, 53, 54) for v in (2**n - 1, 2**n, 2**n + 1, 3 * 2**n + 1) if v < 2**width]
    return edges + ties + [generator.getrandbits(generator.randint(1, width)) for _ in range(300)]


def floats(kind: str) -> list[int]:
    f, generator = FORMATS[kind], random.Random(0)
    found = exact.edges(f) + [generator.getrandbits(f.width) for _ in range(500)]
    for magnitude in (
        Fraction(1, 2),
        Fraction(3, 2),
        Fraction(5, 2),
        127,
        128,
        255,
        256,
        32767,
        65504,
        65520,
        2**31,
        2**32,
        2**63,
        2**64,
    ):
        bits = f.round(Fraction(magnitude))
        found += [f.signed(b, negative) for b in (bits - 1, bits, bits + 1) for negative in (False, True)]
    return found


@pytest.mark.parametrize(("target", "source"), [pair for pair in product(INTEGERS, repeat=2)])
def test_integers(target: str, source: str):
    values = [(v,) for v in integers(source)]
    width = int(target[1:])
    plain = Case(f"cvt.{target}.{source}", target, (source,), lambda v: unsigned(number(source, v), width))
    assert execute(plain, values) == [plain.define(*v) for v in values]
    low, high = limits(target)
    clamped = Case(
        f"cvt.sat.{target}.{source}", target, (source,), lambda v: unsigned(min(high, max(low, number(source, v))), width)
    )
    assert execute(clamped, values) == [clamped.define(*v) for v in values]


@pytest.mark.parametrize("mode", list(ROUNDINGS))
@pytest.mark.parametrize("source", ["f16", "f32", "f64"])
@pytest.mark.parametrize("target", INTEGERS)
def test_floats_to_integers(target: str, source: str, mode: str):
    f, (low, high), width = FORMATS[source], limits(target), int(target[1:])

    def define(bits: int) -> int:
        value = f.value(bits)
        if value == exact.NAN:
            return 0 if width < 64 else 1 << 63
        if value == exact.INFINITE:
            return unsigned(low if f.negative(bits) else high, width)
        return unsigned(min(high, max(low, ROUNDINGS[mode](value))), width)

    values = [(v,) for v in floats(source)]
    assert execute(Case(f"cvt.{mode}.{target}.{source}", target, (source,), define), values) == [define(*v) for v in values]


@pytest.mark.parametrize("direction", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", ["f16", "f32"])
def test_integers_to_floats(target: str, source: str, direction: str):
    f = FORMATS[target]
    case = Case(
        f"cvt.{direction}.{target}.{source}", target, (source,), lambda v: f.round(Fraction(number(source, v)), direction)
    )
    values = [(v,) for v in integers(source)]
    assert execute(case, values) == [case.define(*v) for v in values]


@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64"])
def test_integers_to_f64(source: str):
    f = FORMATS["f64"]
    case = Case(f"cvt.rn.f64.{source}", "f64", (source,), lambda v: f.round(Fraction(number(source, v))))
    values = [(v,) for v in integers(source)]
    assert execute(case, values) == [case.define(*v) for v in values]


def narrowed(target: str, source: str, bits: int, direction: str = "rn") -> int:
    f, g = FORMATS[source], FORMATS[target]
    value, negative = f.value(bits), f.negative(bits)
    if value == exact.NAN:
        return g.nan
    if value == exact.INFINITE:
        return g.signed(g.infinity, negative)
    return g.round(value, direction, negative)


@pytest.mark.parametrize(
    ("target", "source", "direction"),
    [
        *(("f16", "f32", way) for way in ("rn", "rz", "rm", "rp")),
        *(("bf16", "f32", way) for way in ("rn", "rz")),
        *(("f32", "f64", way) for way in ("rn", "rz", "rm", "rp")),
        ("f16", "f64", "rn"),
        ("f32", "f16", ""),
        ("f32", "bf16", ""),
        ("f64", "f32", ""),
        ("f64", "f16", ""),
    ],
)
def test_floats_to_floats(target: str, source: str, direction: str):
    g = FORMATS[target]
    dot = f".{direction}" if direction else ""
    case = Case(f"cvt{dot}.{target}.{source}", target, (source,), lambda v: narrowed(target, source, v, direction or "rn"))
    values = floats(source)
    for bits, got in zip(values, execute(case, [(v,) for v in values]), strict=True):
        wanted = case.define(bits)
        assert got == wanted or g.value(got) == g.value(wanted) == exact.NAN, f"{case} {bits:#x}: {got:#x}, wanted {wanted:#x}"


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_narrow_floats_round_as_torch_does(kind: str, dtype: torch.dtype):
    x = torch.cat([torch.randn(2000), torch.randn(2000) * 1e-5, torch.randn(2000) * 1e5])
    bits = [int(v) % 2**32 for v in x.view(torch.int32)]
    case = Case(f"cvt.rn.{kind}.f32", kind, ("f32",), max)
    wanted = [int(v) % 2**16 for v in x.to(dtype).view(torch.int16)]
    assert execute(case, [(v,) for v in bits]) == wanted
    back = Case(f"cvt.f32.{kind}", "f32", (kind,), max)
    assert execute(back, [(v,) for v in wanted]) == [int(v) % 2**32 for v in x.to(dtype).float().view(torch.int32)]


@pytest.mark.parametrize(("kind", "relu"), [("bf16", ""), ("f16", ""), ("bf16", ".relu"), ("f16", ".relu")])
def test_a_pair_has_its_first_source_high(kind: str, relu: str):
    g, values = FORMATS[kind], floats("f32")
    pairs = list(zip(values, values[::-1], strict=True))

    def one(bits: int) -> int:
        result = narrowed(kind, "f32", bits)
        return 0 if relu and g.negative(result) and g.value(result) != exact.NAN else result

    got = execute(Case(f"cvt.rn{relu}.{kind}x2.f32", f"{kind}x2", ("f32", "f32"), max), pairs)
    assert got == [one(a) << 16 | one(b) for a, b in pairs]


@pytest.mark.parametrize("mode", list(ROUNDINGS))
def test_rounding_to_whole_floats(mode: str):
    def define(bits: int) -> int:
        value = F32.value(bits)
        if value in (exact.NAN, exact.INFINITE):
            return F32.nan if value == exact.NAN else bits
        return F32.round(Fraction(ROUNDINGS[mode](value)), "rn", F32.negative(bits))

    values = floats("f32")
    assert execute(Case(f"cvt.{mode}.f32.f32", "f32", ("f32",), define), [(v,) for v in values]) == [define(v) for v in values]


def test_saturation_and_flushing():
    def saturated(bits: int) -> int:
        value = F32.value(bits)
        if value == exact.NAN or F32.negative(bits):
            return 0
        return exact.one(F32) if value == exact.INFINITE or value > 1 else bits

    values = floats("f32")
    assert execute(Case("cvt.sat.f32.f32", "f32", ("f32",), max), [(v,) for v in values]) == [saturated(v) for v in values]
    got = execute(Case("cvt.ftz.f32.f32", "f32", ("f32",), max), [(v,) for v in values])
    assert got == [F32.nan if F32.value(v) == exact.NAN else F32.flush(v) for v in values]


def test_tf32_rounds_ties_away_from_zero():
    def define(bits: int) -> int:
        value = F32.value(bits)
        return bits if value == exact.INFINITE else TF32.round(value, "rna", F32.negative(bits)) << 13

    values = [v for v in floats("f32") if F32.value(v) != exact.NAN] + [0x3F801000, 0x3F803000, 0xBF801000, 0x3F800FFF]
    assert execute(Case("cvt.rna.tf32.f32", "f32", ("f32",), define), [(v,) for v in values]) == [define(v) for v in values]
