"""Each integer and bit instruction of the emulator against a definition in Python's integers."""

from __future__ import annotations

import random
from itertools import product

import pytest

from emulation.one_instruction import Case, execute, signed, unsigned

MASK32, MASK64 = 2**32 - 1, 2**64 - 1


def operands(widths: list[int], seed: int = 0) -> list[tuple[int, ...]]:
    """Edges with edges, and random ones."""
    generator = random.Random(seed)
    edges = {w: [0, 1, 2, 7, 31, 2 ** (w - 1) - 1, 2 ** (w - 1), 2 ** (w - 1) + 1, 2**w - 2, 2**w - 1] for w in widths}
    tuples = list(product(*[edges[w] if len(widths) < 4 else edges[w][::2] for w in widths]))
    tuples += [tuple(generator.getrandbits(w) for w in widths) for _ in range(300)]
    return tuples + [tuple(generator.getrandbits(generator.randint(1, w)) for w in widths) for _ in range(300)]


def number(kind: str, bits: int) -> int:
    """The integer that bits of a type are."""
    return signed(bits, int(kind[1:])) if kind[0] == "s" else bits


def truncated(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return -quotient if (a < 0) != (b < 0) else quotient


def typed(kind: str, function, result: str = "", third: str = ""):
    """A definition on integers as one on bits."""
    width = int((result or kind)[1:])

    def define(*bits: int) -> int:
        values = [number(kind if n < 2 or not third else third, b) for n, b in enumerate(bits)]
        return unsigned(function(*values), width)

    return define


def arithmetic() -> list[Case]:
    cases = []
    for kind in ("u16", "s16", "u32", "s32", "u64", "s64"):
        width = int(kind[1:])
        two = (kind, kind)
        cases += [
            Case(f"add.{kind}", kind, two, typed(kind, lambda a, b: a + b)),
            Case(f"sub.{kind}", kind, two, typed(kind, lambda a, b: a - b)),
            Case(f"mul.lo.{kind}", kind, two, typed(kind, lambda a, b: a * b)),
            Case(f"mul.hi.{kind}", kind, two, typed(kind, lambda a, b, w=width: a * b >> w)),
            Case(f"mad.lo.{kind}", kind, (kind,) * 3, typed(kind, lambda a, b, c: a * b + c)),
            Case(f"mad.hi.{kind}", kind, (kind,) * 3, typed(kind, lambda a, b, c, w=width: (a * b >> w) + c)),
            Case(f"min.{kind}", kind, two, typed(kind, min)),
            Case(f"max.{kind}", kind, two, typed(kind, max)),
            Case(f"div.{kind}", kind, two, typed(kind, lambda a, b: truncated(a, b) if b else -1)),
            Case(f"rem.{kind}", kind, two, typed(kind, lambda a, b: a - b * truncated(a, b) if b else a)),
            Case(f"sad.{kind}", kind, (kind,) * 3, typed(kind, lambda a, b, c: c + abs(a - b))),
        ]
        if width < 64:
            wide = f"{kind[0]}{2 * width}"
            cases.append(Case(f"mul.wide.{kind}", wide, two, typed(kind, lambda a, b: a * b, wide)))
            cases.append(Case(f"mad.wide.{kind}", wide, (*two, wide), typed(kind, lambda a, b, c: a * b + c, wide, wide)))
        if kind[0] == "s":
            cases.append(Case(f"abs.{kind}", kind, (kind,), typed(kind, abs)))
            cases.append(Case(f"neg.{kind}", kind, (kind,), typed(kind, lambda a: -a)))
    cases += [
        Case("add.sat.s32", "s32", ("s32",) * 2, typed("s32", lambda a, b: max(-(2**31), min(2**31 - 1, a + b)))),
        Case("sub.sat.s32", "s32", ("s32",) * 2, typed("s32", lambda a, b: max(-(2**31), min(2**31 - 1, a - b)))),
        Case("mul24.lo.u32", "u32", ("u32",) * 2, lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF) & MASK32),
        Case(
            "mul24.hi.s32",
            "s32",
            ("s32",) * 2,
            lambda a, b: unsigned(signed(a & 0xFFFFFF, 24) * signed(b & 0xFFFFFF, 24) >> 16, 32),
        ),
        Case(
            "mad24.lo.s32",
            "s32",
            ("s32",) * 3,
            lambda a, b, c: unsigned(signed(a & 0xFFFFFF, 24) * signed(b & 0xFFFFFF, 24) + c, 32),
        ),
    ]
    return cases


def logic() -> list[Case]:
    cases = []
    for kind in ("b16", "b32", "b64"):
        width = int(kind[1:])
        cases += [
            Case(f"and.{kind}", kind, (kind,) * 2, lambda a, b: a & b),
            Case(f"or.{kind}", kind, (kind,) * 2, lambda a, b: a | b),
            Case(f"xor.{kind}", kind, (kind,) * 2, lambda a, b: a ^ b),
            Case(f"not.{kind}", kind, (kind,), lambda a, w=width: unsigned(~a, w)),
            Case(f"cnot.{kind}", kind, (kind,), lambda a: int(a == 0)),
            Case(f"shl.{kind}", kind, (kind, "u32"), lambda a, n, w=width: unsigned(a << min(n, w), w)),
            Case(f"shr.u{width}", kind, (kind, "u32"), lambda a, n, w=width: a >> min(n, w)),
            Case(f"shr.s{width}", kind, (kind, "u32"), lambda a, n, w=width: unsigned(signed(a, w) >> min(n, w), w)),
        ]
        if width > 16:
            cases += [
                Case(f"brev.{kind}", kind, (kind,), lambda a, w=width: int(f"{a:0{w}b}"[::-1], 2)),
                Case(f"popc.{kind}", "u32", (kind,), lambda a: a.bit_count()),
                Case(f"clz.{kind}", "u32", (kind,), lambda a, w=width: w - a.bit_length()),
                Case(f"bfi.{kind}", kind, (kind, kind, "u32", "u32"), lambda a, b, p, n, w=width: insert(a, b, p, n, w)),
            ]
            for sign in "us":
                kind_e = f"{sign}{width}"
                cases.append(Case(f"bfe.{kind_e}", kind, (kind, "u32", "u32"), lambda a, p, n, k=kind_e: extract(a, p, n, k)))
                cases.append(Case(f"bfind.{kind_e}", "u32", (kind,), lambda a, k=kind_e: find(a, k)))
                cases.append(Case(f"bfind.shiftamt.{kind_e}", "u32", (kind,), lambda a, k=kind_e: find(a, k, True)))
    for way, mode in product("lr", ("wrap", "clamp")):
        cases.append(
            Case(f"shf.{way}.{mode}.b32", "b32", ("b32", "b32", "u32"), lambda a, b, c, w=way, m=mode: funnel(a, b, c, w, m))
        )
    for table in (0xC0, 0xE8, 0x96, 0x1B, 0x00, 0xFF):
        cases.append(
            Case(
                f"lop3.b32 {table:#x}",
                "b32",
                ("b32",) * 3,
                lambda a, b, c, t=table: by_table(a, b, c, t),
                f"lop3.b32 {{0}}, {{1}}, {{2}}, {{3}}, {table:#x};",
            )
        )
    cases.append(Case("prmt.b32", "b32", ("b32",) * 3, permute))
    for mode in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16"):
        cases.append(Case(f"prmt.b32.{mode}", "b32", ("b32",) * 3, lambda a, b, c, m=mode: permute_mode(a, b, c, m)))
    for ka, kb in product(("u32", "s32"), repeat=2):
        cases.append(Case(f"dp4a.{ka}.{kb}", "b32", ("b32",) * 3, lambda a, b, c, x=ka, y=kb: dot(a, b, c, x, y)))
        for part, shift in (("lo", 0), ("hi", 16)):
            cases.append(
                Case(
                    f"dp2a.{part}.{ka}.{kb}",
                    "b32",
                    ("b32",) * 3,
                    lambda a, b, c, x=ka, y=kb, s=shift: dot_halves(a, b >> s, c, x, y),
                )
            )
    return cases


def insert(a: int, b: int, start: int, length: int, width: int) -> int:
    """Bit by bit, as the PTX ISA writes it."""
    start, length = start & 255, length & 255
    for n in range(length):
        if start + n < width:
            b = b & ~(1 << (start + n)) | (a >> n & 1 if n < width else 0) << (start + n)
    return b


def extract(a: int, start: int, length: int, kind: str) -> int:
    width, start, length = int(kind[1:]), start & 255, length & 255
    top = width - 1
    sign = 0 if kind[0] == "u" or length == 0 else a >> min(start + length - 1, top) & 1
    result = 0
    for n in range(width):
        result |= (a >> (start + n) & 1 if n < length and start + n <= top else sign) << n
    return result


def find(a: int, kind: str, amount: bool = False) -> int:
    width = int(kind[1:])
    if kind[0] == "s" and a >> (width - 1):
        a = unsigned(~a, width)
    if a == 0:
        return MASK32
    return width - a.bit_length() if amount else a.bit_length() - 1


def funnel(a: int, b: int, count: int, way: str, mode: str) -> int:
    n = count & 31 if mode == "wrap" else min(count, 32)
    return (b << 32 | a) << n >> 32 & MASK32 if way == "l" else (b << 32 | a) >> n & MASK32


def by_table(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> ((a >> n & 1) << 2 | (b >> n & 1) << 1 | c >> n & 1) & 1) << n for n in range(32))


def permute(a: int, b: int, select: int) -> int:
    pool, result = b << 32 | a, 0
    for n in range(4):
        code = select >> 4 * n & 15
        byte = pool >> 8 * (code & 7) & 255
        result |= ((255 if byte & 128 else 0) if code & 8 else byte) << 8 * n
    return result


def permute_mode(a: int, b: int, select: int, mode: str) -> int:
    order = {
        "f4e": ("3210", "4321", "5432", "6543"),
        "b4e": ("5670", "6701", "7012", "0123"),
        "rc8": ("0000", "1111", "2222", "3333"),
        "ecl": ("3210", "3211", "3222", "3333"),
        "ecr": ("0000", "1110", "2210", "3210"),
        "rc16": ("1010", "3232", "1010", "3232"),
    }[mode][select & 3]
    return permute(a, b, int(order, 16))


def dot(a: int, b: int, c: int, kind_a: str, kind_b: str) -> int:
    def byte(x: int, n: int, kind: str) -> int:
        return signed(x >> 8 * n & 255, 8) if kind == "s32" else x >> 8 * n & 255

    return unsigned(c + sum(byte(a, n, kind_a) * byte(b, n, kind_b) for n in range(4)), 32)


def dot_halves(a: int, b: int, c: int, kind_a: str, kind_b: str) -> int:
    def piece(x: int, n: int, width: int, kind: str) -> int:
        bits = x >> width * n & (1 << width) - 1
        return signed(bits, width) if kind == "s32" else bits

    return unsigned(c + sum(piece(a, n, 16, kind_a) * piece(b, n, 8, kind_b) for n in range(2)), 32)


WIDTHS = {"u16": 16, "s16": 16, "b16": 16, "u32": 32, "s32": 32, "b32": 32, "u64": 64, "s64": 64, "b64": 64}


@pytest.mark.parametrize("case", arithmetic() + logic(), ids=str)
def test_instruction(case: Case):
    tuples = operands([WIDTHS[kind] for kind in case.sources])
    if case.opcode.startswith(("bf", "sh")):
        generator = random.Random(1)
        tuples += [(*t[: len(t) - 1], generator.randint(0, 70)) for t in tuples]
        tuples += [(*t[: len(t) - 2], generator.randint(0, 70), t[-1]) for t in tuples if len(t) > 2]
    for values, got in zip(tuples, execute(case, tuples), strict=True):
        assert got == case.define(*values), f"{case} {[hex(v) for v in values]}: {got:#x}"


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("word", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons(word: str, kind: str):
    test = {"eq": int.__eq__, "ne": int.__ne__, "lt": int.__lt__, "le": int.__le__, "gt": int.__gt__, "ge": int.__ge__}[word]
    case = Case(f"setp.{word}.{kind}", "pred", (kind, kind), lambda a, b: int(test(number(kind, a), number(kind, b))))
    tuples = operands([WIDTHS[kind]] * 2)
    assert execute(case, tuples) == [case.define(*values) for values in tuples]


@pytest.mark.parametrize("word", ["lo", "ls", "hi", "hs"])
def test_unsigned_comparisons_by_name(word: str):
    test = {"lo": int.__lt__, "ls": int.__le__, "hi": int.__gt__, "hs": int.__ge__}[word]
    tuples = operands([32, 32])
    assert execute(Case(f"setp.{word}.u32", "pred", ("u32", "u32"), test), tuples) == [int(test(*v)) for v in tuples]


@pytest.mark.parametrize("combine", ["and", "or", "xor"])
def test_setp_combines_and_has_two_destinations(combine: str):
    join = {"and": int.__and__, "or": int.__or__, "xor": int.__xor__}[combine]
    text = (
        f"setp.lt.{combine}.s32 %p5|%p6, {{1}}, {{2}}, {{3}};"
        "selp.u32 %r3, 1, 0, %p5; selp.u32 %r4, 2, 0, %p6; or.b32 {0}, %r3, %r4;"
    )
    inverted = text.replace("{3};", "!{3};", 1)
    tuples = [(a, b, c) for a, b in operands([32, 32]) for c in (0, 1)]
    for template, flip in ((text, 0), (inverted, 1)):
        got = execute(Case("setp", "b32", ("s32", "s32", "pred"), max, template), tuples)
        less = [int(signed(a, 32) < signed(b, 32)) for a, b, _ in tuples]
        wanted = [join(h, c ^ flip) | join(1 - h, c ^ flip) << 1 for h, (_, _, c) in zip(less, tuples, strict=True)]
        assert got == wanted


@pytest.mark.parametrize(("kind", "true"), [("u32", MASK32), ("s32", MASK32), ("f32", 0x3F800000)])
def test_set(kind: str, true: int):
    tuples = operands([32, 32])
    got = execute(Case(f"set.lt.{kind}.u32", kind, ("u32", "u32"), max), tuples)
    assert got == [true if a < b else 0 for a, b in tuples]


def test_selection():
    tuples = [(a, b, c) for a, b in operands([32, 32]) for c in (0, 1)]
    assert execute(Case("selp.b32", "b32", ("b32", "b32", "pred"), max), tuples) == [a if c else b for a, b, c in tuples]
    tuples = operands([32, 32, 32])
    got = execute(Case("slct.b32.s32", "b32", ("b32", "b32", "s32"), max), tuples)
    assert got == [a if signed(c, 32) >= 0 else b for a, b, c in tuples]


@pytest.mark.parametrize("name", ["add", "sub"])
def test_carries_through_three_words(name: str):
    """64-bit sums by halves, with a word above them that only the carry reaches."""
    text = (
        "mov.b64 {{%r3, %r4}}, {1}; mov.b64 {{%r5, %r6}}, {2};"
        f"{name}.cc.u32 %r3, %r3, %r5; {name}c.cc.u32 %r4, %r4, %r6; {name}c.u32 %r7, 0, 0;"
        "mov.b64 %rd3, {{%r3, %r4}}; cvt.u64.u32 %rd4, %r7; xor.b64 {0}, %rd3, %rd4;"
    )
    tuples = operands([64, 64])
    sign = 1 if name == "add" else -1
    wanted = [(a + sign * b & MASK64) ^ (a + sign * b >> 64 & MASK32) for a, b in tuples]
    assert execute(Case(name, "b64", ("b64", "b64"), max, text), tuples) == wanted


def test_products_carry():
    """a·b + c of 128 bits by words."""
    text = (
        "mov.b64 {%r3, %r4}, {1}; mov.b64 {%r5, %r6}, {2}; mul.lo.u32 %r7, %r3, %r5;"
        "mul.hi.u32 %r8, %r3, %r5; mad.lo.cc.u32 %r8, %r4, %r5, %r8; madc.hi.u32 %r9, %r4, %r5, 0;"
        "mad.lo.cc.u32 %r8, %r3, %r6, %r8; madc.hi.cc.u32 %r9, %r3, %r6, %r9; addc.u32 %r2, 0, 0;"
        "mad.lo.cc.u32 %r9, %r4, %r6, %r9; madc.hi.u32 %r2, %r4, %r6, %r2; mov.b64 %rd3, {%r7, %r8}; mov.b64 %rd4, {%r9, %r2};"
        "xor.b64 {0}, %rd3, %rd4;"
    )
    for n in (3, 4, 5, 6, 7, 8, 9):
        text = text.replace(f"{{%r{n}", f"{{{{%r{n}").replace(f"%r{n}}}", f"%r{n}}}}}")
    text = text.replace("%r2}", "%r2}}")
    tuples = operands([64, 64])
    wanted = [(a * b & MASK64) ^ (a * b >> 64) for a, b in tuples]
    assert execute(Case("mad", "b64", ("b64", "b64"), max, text), tuples) == wanted


def test_vectors_pack_and_unpack_from_the_low_end():
    text = "mov.b64 {{%r3, %r4}}, {1}; mov.b32 {{%rs3, %rs4}}, %r3; mov.b32 %r5, {{%rs4, %rs3}}; mov.b64 {0}, {{%r4, %r5}};"
    tuples = [(v,) for (v,) in operands([64])]
    wanted = [v >> 32 | (v >> 16 & 0xFFFF) << 32 | (v & 0xFFFF) << 48 for (v,) in tuples]
    assert execute(Case("mov", "b64", ("b64",), max, text), tuples) == wanted


@pytest.mark.parametrize("text", ["-1", "0xFFFFFFFF", "4294967295", "-0x1", "0b11111111111111111111111111111111"])
def test_immediates(text: str):
    assert execute(Case("mov", "b32", ("b32",), max, f"add.u32 {{0}}, {{1}}, {text};"), [(5,)]) == [4]


def test_float_immediates_are_bits():
    text = "mov.f32 %r3, 0f3F800000; mov.b32 %r4, 0f40000000; xor.b32 {0}, %r3, %r4;"
    assert execute(Case("mov", "b32", ("b32",), max, text), [(0,)]) == [0x3F800000 ^ 0x40000000]
