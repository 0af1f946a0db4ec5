"""Each floating-point instruction of the emulator against IEEE's definition in fractions, bit for bit."""

from __future__ import annotations

import math
import random
import struct
from itertools import product

import pytest

from emulation import exact_floats as exact
from emulation.exact_floats import BF16, F16, F32, F64, FORMATS, Format
from emulation.one_instruction import Case, execute

DIRECTIONS = ("rn", "rz", "rm", "rp")


def operands(f: Format, count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Edges with edges; random bits; numbers of one magnitude, where sums cancel and products tie."""
    generator = random.Random(seed)
    some = exact.edges(f)
    few = [some[i] for i in (0, 1, 2, 6, 8, 15, 18, 20, 21, 22)]
    tuples = list(product(*[some if count < 3 else few] * count))
    tuples += [tuple(generator.getrandbits(f.width) for _ in range(count)) for _ in range(300)]
    near = [exact.one(f) + generator.getrandbits(f.fraction + 2) - (1 << f.fraction) for _ in range(900)]
    short = [exact.one(f) + (generator.getrandbits(f.fraction // 2 + 2) << (f.fraction - f.fraction // 2)) for _ in range(900)]
    for values in (near, short):
        tuples += [tuple(f.signed(generator.choice(values), generator.random() < 0.5) for _ in range(count)) for _ in range(300)]
    return tuples


def double_rounding() -> list[tuple[int, ...]]:
    """fma operands whose exact sum lies beside a midpoint of fp32, nearer than fp64 can tell."""
    generator = random.Random(1)
    found = []
    for _ in range(200):
        a, b = (F32.round(exact.Fraction(1) + exact.Fraction(1, 2 ** generator.randint(1, 12))) for _ in range(2))
        c = F32.round(exact.Fraction(generator.choice((1, -1)), 2 ** generator.randint(50, 100)))
        big = F32.round(exact.Fraction((1 << 23) + generator.getrandbits(23), 1))
        half = F32.round(exact.Fraction(generator.choice((1, 3)), 2))
        found += [(a, b, c), (half, exact.one(F32), big)]
        # half a unit of the last place, a tiny number beside it
        tiny = F32.round(exact.Fraction(1, 2) + exact.Fraction(1, 2**24))
        found.append((tiny, F32.round(exact.Fraction(1) - exact.Fraction(generator.choice((1, 2, 3)), 2**24)), big))
    return found


def arithmetic_cases() -> list[Case]:
    cases = []
    for way in DIRECTIONS:
        cases += [
            Case(f"add.{way}.f32", "f32", ("f32",) * 2, lambda a, b, w=way: exact.add(F32, a, b, w)),
            Case(f"sub.{way}.f32", "f32", ("f32",) * 2, lambda a, b, w=way: exact.subtract(F32, a, b, w)),
            Case(f"mul.{way}.f32", "f32", ("f32",) * 2, lambda a, b, w=way: exact.multiply(F32, a, b, w)),
            Case(f"div.{way}.f32", "f32", ("f32",) * 2, lambda a, b, w=way: exact.divide(F32, a, b, w)),
            Case(f"fma.{way}.f32", "f32", ("f32",) * 3, lambda a, b, c, w=way: exact.fma(F32, a, b, c, w)),
            Case(f"sqrt.{way}.f32", "f32", ("f32",), lambda a, w=way: exact.square_root(F32, a, w)),
            Case(f"rcp.{way}.f32", "f32", ("f32",), lambda a, w=way: exact.divide(F32, exact.one(F32), a, w)),
        ]

    def flushing(define, count):
        return lambda *v: F32.flush(define(F32, *[F32.flush(x) for x in v[:count]]))

    cases += [
        Case("add.f32", "f32", ("f32",) * 2, lambda a, b: exact.add(F32, a, b)),
        Case("add.ftz.f32", "f32", ("f32",) * 2, flushing(exact.add, 2)),
        Case("mul.ftz.f32", "f32", ("f32",) * 2, flushing(exact.multiply, 2)),
        Case("fma.rn.ftz.f32", "f32", ("f32",) * 3, flushing(exact.fma, 3)),
        Case("add.sat.f32", "f32", ("f32",) * 2, lambda a, b: saturate(exact.add(F32, a, b))),
        Case("div.full.f32", "f32", ("f32",) * 2, lambda a, b: exact.divide(F32, a, b)),
        Case("div.approx.ftz.f32", "f32", ("f32",) * 2, flushing(exact.divide, 2)),
        Case("add.f64", "f64", ("f64",) * 2, lambda a, b: exact.add(F64, a, b)),
        Case("mul.rn.f64", "f64", ("f64",) * 2, lambda a, b: exact.multiply(F64, a, b)),
        Case("div.rn.f64", "f64", ("f64",) * 2, lambda a, b: exact.divide(F64, a, b)),
        Case("fma.rn.f64", "f64", ("f64",) * 3, lambda a, b, c: exact.fma(F64, a, b, c)),
        Case("copysign.f32", "f32", ("f32",) * 2, lambda a, b: b & 0x7FFFFFFF | a & 0x80000000),
        Case("neg.f32", "f32", ("f32",), lambda a: exact.negate(F32, a)),
        Case("abs.f32", "f32", ("f32",), lambda a: a & 0x7FFFFFFF),
        Case("neg.f64", "f64", ("f64",), lambda a: exact.negate(F64, a)),
    ]
    for kind in ("f32", "f64", "f16", "bf16"):
        f = FORMATS[kind]
        for name in ("min", "max"):
            for nan in ("", ".NaN") if kind != "f64" else ("",):
                largest, propagates = name == "max", bool(nan)
                cases.append(
                    Case(
                        f"{name}{nan}.{kind}",
                        kind,
                        (kind,) * 2,
                        lambda a, b, f=f, m=largest, p=propagates: exact.extremum(f, a, b, m, p),
                    )
                )
    for kind in ("f16", "bf16"):
        f = FORMATS[kind]
        cases.append(Case(f"fma.rn.{kind}", kind, (kind,) * 3, lambda a, b, c, f=f: exact.fma(f, a, b, c)))
        cases.append(Case(f"neg.{kind}", kind, (kind,), lambda a, f=f: exact.negate(f, a)))
        cases.append(Case(f"abs.{kind}", kind, (kind,), lambda a: a & 0x7FFF))
    cases += [
        Case("add.f16", "f16", ("f16",) * 2, lambda a, b: exact.add(F16, a, b)),
        Case("sub.rn.f16", "f16", ("f16",) * 2, lambda a, b: exact.subtract(F16, a, b)),
        Case("mul.f16", "f16", ("f16",) * 2, lambda a, b: exact.multiply(F16, a, b)),
        Case("fma.rn.relu.bf16", "bf16", ("bf16",) * 3, lambda a, b, c: relu(BF16, exact.fma(BF16, a, b, c))),
    ]
    return cases


def saturate(bits: int) -> int:
    value = F32.value(bits)
    if value == exact.NAN or F32.negative(bits):
        return 0
    return exact.one(F32) if value == exact.INFINITE or value > 1 else bits


def relu(f: Format, bits: int) -> int:
    return 0 if f.negative(bits) and f.value(bits) != exact.NAN else bits


def same(f: Format, got: int, wanted: int) -> bool:
    """Bit for bit; a NaN is a NaN."""
    return got == wanted or f.value(got) == f.value(wanted) == exact.NAN


@pytest.mark.parametrize("case", arithmetic_cases(), ids=str)
def test_arithmetic(case: Case):
    f = FORMATS[case.result]
    tuples = operands(f, len(case.sources))
    if case.opcode.startswith("fma") and case.result == "f32":
        tuples += double_rounding()
    for values, got in zip(tuples, execute(case, tuples), strict=True):
        wanted = case.define(*values)
        assert same(f, got, wanted), f"{case} {[hex(v) for v in values]}: {got:#x}, wanted {wanted:#x}"


PAIRS = [(n, "f16x2") for n in ("fma.rn", "add", "mul", "min", "neg")] + [(n, "bf16x2") for n in ("fma.rn", "min", "neg")]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_pairs_are_two_halves(name: str, kind: str):
    half = kind.removesuffix("x2")
    f = FORMATS[half]
    count = {"fma.rn": 3, "neg": 1}.get(name, 2)
    define = {
        "fma.rn": exact.fma,
        "add": exact.add,
        "mul": exact.multiply,
        "min": lambda f, a, b: exact.extremum(f, a, b, False),
        "neg": exact.negate,
    }[name]
    low, high = operands(f, count, 1)[:400], operands(f, count, 2)[-400:]
    pairs = [tuple(a | b << 16 for a, b in zip(x, y, strict=True)) for x, y in zip(low, high, strict=True)]
    case = Case(f"{name}.{kind}", kind, (kind,) * count, define)
    for x, y, got in zip(low, high, execute(case, pairs), strict=True):
        assert same(f, got & 0xFFFF, define(f, *x)) and same(f, got >> 16, define(f, *y))


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("word", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"])
def test_comparisons(word: str, kind: str):
    f = FORMATS[kind]
    case = Case(f"setp.{word}.{kind}", "pred", (kind, kind), lambda a, b: int(exact.compare(f, word, a, b)))
    tuples = operands(f, 2)[:700]
    assert execute(case, tuples) == [case.define(*values) for values in tuples]


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("ex2.approx.ftz", lambda x: 2.0**x),
        ("ex2.approx", lambda x: 2.0**x),
        ("lg2.approx", math.log2),
        ("sin.approx", math.sin),
        ("cos.approx", math.cos),
        ("tanh.approx", math.tanh),
        ("rsqrt.approx", lambda x: 1 / math.sqrt(x)),
        ("sqrt.approx", math.sqrt),
        ("rcp.approx.ftz", lambda x: 1 / x),
    ],
)
def test_approximate_functions(name: str, function):
    """Within half a unit of the last place, and a little for the function that this test calls."""
    generator = random.Random(0)
    positive = name.startswith(("lg2", "rsqrt", "sqrt"))
    numbers = [generator.uniform(0.0 if positive else -20.0, 20.0) for _ in range(500)] + [1.0, 0.5, 2.0]
    bits = [struct.unpack("<I", struct.pack("<f", x))[0] for x in numbers]
    case = Case(f"{name}.f32", "f32", ("f32",), lambda a: a)
    for b, got in zip(bits, execute(case, [(b,) for b in bits]), strict=True):
        x, y = (struct.unpack("<f", struct.pack("<I", v))[0] for v in (b, got))
        assert y == pytest.approx(function(x), rel=2**-24 + 2**-40, abs=2**-126), (name, x)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize(("name", "function"), [("ex2.approx", lambda x: 2.0**x), ("tanh.approx", math.tanh)])
def test_approximate_functions_of_halves(name: str, function, kind: str):
    f, generator = FORMATS[kind], random.Random(0)
    bits = [f.round(exact.Fraction(generator.uniform(-8, 8))) for _ in range(300)]
    wanted = [f.round(exact.Fraction(function(float(f.value(b))))) for b in bits]
    ftz = ".ftz" if name == "ex2.approx" and kind == "bf16" else ""
    assert execute(Case(f"{name}{ftz}.{kind}", kind, (kind,), max), [(b,) for b in bits]) == wanted
    pairs = [(a << 16 | b,) for a, b in zip(bits, bits[::-1], strict=True)]
    got = execute(Case(f"{name}{ftz}.{kind}x2", f"{kind}x2", (f"{kind}x2",), max), pairs)
    assert got == [a << 16 | b for a, b in zip(wanted, wanted[::-1], strict=True)]


def test_what_arithmetic_calls_nan_is_the_gpus():
    case = Case("mul.f32", "f32", ("f32", "f32"), lambda a, b: a)
    assert execute(case, [(F32.infinity, 0), (0xFFC12345, exact.one(F32))]) == [0x7FFFFFFF, 0x7FFFFFFF]


@pytest.mark.parametrize(
    ("word", "holds"),
    [
        ("finite", lambda v: v not in (exact.NAN, exact.INFINITE)),
        ("infinite", lambda v: v == exact.INFINITE),
        ("number", lambda v: v != exact.NAN),
        ("notanumber", lambda v: v == exact.NAN),
        ("normal", lambda v: v not in (exact.NAN, exact.INFINITE) and abs(v) >= exact.Fraction(1, 2**126)),
        ("subnormal", lambda v: v not in (exact.NAN, exact.INFINITE, 0) and abs(v) < exact.Fraction(1, 2**126)),
    ],
)
def test_properties(word: str, holds):
    case = Case(f"testp.{word}.f32", "pred", ("f32",), lambda a: int(holds(F32.value(a))))
    bits = exact.edges(F32)
    assert execute(case, [(b,) for b in bits]) == [case.define(b) for b in bits]
