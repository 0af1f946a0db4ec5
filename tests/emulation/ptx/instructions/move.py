"""mov, predicates, selection, addresses."""

from __future__ import annotations

import numpy as np

from ..decode import LOCAL_WINDOW, SHARED_WINDOW, WINDOW, Decoder, Step, Values, instruction
from ..memory import Lanes
from ..state import State
from ..syntax import Not, Pair, Register, Vector
from ..types import dtype_of

COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
TYPES = ("pred", "b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64", "b128")


@instruction("mov")
def move(d: Decoder) -> Step:
    kind = d.kind(*TYPES)
    d.arity(2)
    bits = kind if kind in ("pred", "b128") else f"u{8 * dtype_of(kind).itemsize}"
    source = d.operands[1]
    if isinstance(source, Vector) and isinstance(d.operands[0], Vector):
        raise d.unsupported("vector to vector")
    typed = isinstance(source, Register | Vector | Not)
    get, put = d.source(1, bits if typed else kind), d.target(0, bits)
    if typed:
        return lambda s, lanes: put(s, lanes, get(s, lanes))
    unsigned = dtype_of(bits)
    return lambda s, lanes: put(s, lanes, get(s, lanes).view(unsigned))


@instruction("selp")
def select(d: Decoder) -> Step:
    kind = d.kind()
    return d.elementwise(lambda a, b, p: np.where(p, a, b), kind, kind, kind, "pred")


@instruction("slct")
def select_by_sign(d: Decoder) -> Step:
    sign = d.kind("s32", "f32")
    kind = d.kind()
    d.take("ftz")
    return d.elementwise(lambda a, b, c: np.where(c >= 0, a, b), kind, kind, kind, sign)


@instruction("setp", "set")
def compare(d: Decoder) -> Step:
    """p|q = a cmp b, combined with c: q has the complement of cmp in p's place."""
    kind = d.kind()
    result = "pred" if d.name == "setp" else d.kind("u32", "s32", "f32", "b32")
    ftz = bool(d.take("ftz"))
    test = comparison(d, d.modifiers.pop(0), kind, ftz)
    combine = COMBINE[word] if (word := d.take(*COMBINE)) else None
    d.arity(4 if combine else 3)
    if not combine and result == "pred" and not isinstance(d.operands[0], Pair):
        return d.elementwise(test, "pred", *operand_kinds(kind))
    first, second = d.pair(0)
    yes, no = d.target(first, result), d.target(second, result)
    a, b = (d.source(n, k) for n, k in enumerate(operand_kinds(kind), 1))
    other = d.source(3, "pred") if combine else None
    true = np.uint32(0xFFFFFFFF) if result != "f32" else np.float32(1)

    def step(s: State, lanes: Lanes) -> None:
        holds = test(a(s, lanes), b(s, lanes))
        fails = ~holds
        if combine:
            c = other(s, lanes)
            holds, fails = combine(holds, c), combine(fails, c)
        if result != "pred":
            holds = np.where(holds, true, true.dtype.type(0))
            holds = holds.view(dtype_of(result))
            put_only(s, lanes, holds)
            return
        yes(s, lanes, holds)
        no(s, lanes, fails)

    put_only = yes
    return step


def operand_kinds(kind: str) -> tuple[str, str]:
    """bf16 compares as the float that its bits begin."""
    return kind, kind


def comparison(d: Decoder, word: str, kind: str, ftz: bool) -> Step:
    """A comparison of PTX: ordered ones are false for NaN, those with a u behind are true."""
    from .half import widened

    if (
        kind in ("f16x2", "bf16x2")
        or word not in COMPARE
        and word not in ("equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
    ):
        raise d.unsupported(f"comparison .{word}.{kind}")
    floating = kind in ("f16", "bf16", "f32", "f64")
    if not floating:
        if word not in COMPARE:
            raise d.unsupported(f"comparison .{word}.{kind}")
        return COMPARE[word]
    widen = widened(kind, ftz)

    def test(a: Values, b: Values) -> Values:
        a, b = widen(a), widen(b)
        nan = np.isnan(a) | np.isnan(b)
        if word in ("num", "nan"):
            return nan if word == "nan" else ~nan
        if word == "ne":
            return (a != b) & ~nan
        return COMPARE[word](a, b) if word in COMPARE else COMPARE[word[:-1]](a, b) | nan

    if kind in ("f32", "f64") and not ftz and word in COMPARE and word != "ne":
        return COMPARE[word]
    return test


@instruction("cvta")
def generic_address(d: Decoder) -> Step:
    kind = d.kind("u64", "u32")
    to = bool(d.take("to"))
    space = d.need("shared", "shared:cta", "global", "local", "const", "param")
    window = np.uint64(WINDOW[space.split(":")[0]])
    if not window:
        return d.elementwise(lambda a: a, kind, kind)
    return d.elementwise((lambda a: a - window) if to else (lambda a: a + window), kind, kind)


@instruction("isspacep")
def in_space(d: Decoder) -> Step:
    space = d.need("global", "shared", "shared:cta", "local", "const", "param").split(":")[0]
    window = {"shared": SHARED_WINDOW >> 56, "local": LOCAL_WINDOW >> 56, "global": 0}.get(space)
    if window is None:
        raise d.unsupported("const and param addresses are global ones here")
    return d.elementwise(lambda a: (a >> np.uint64(56)) == np.uint64(window), "pred", "u64")
