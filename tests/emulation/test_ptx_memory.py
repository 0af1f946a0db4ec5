"""Loads, stores, copies and atomics of the emulator, from PTX written for the purpose."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from emulation.one_instruction import HEAD, aligned, kernel, launch, run, signed
from emulation.ptx import InFlight, Memory, OutOfBounds, Program, Race, Unsupported

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("kind", ["u8", "s8", "u16", "s16"])
@pytest.mark.parametrize("qualifiers", ["", ".ca", ".cg", ".nc", ".nc.L1::no_allocate.L2::128B", ".L1::evict_last", ".cs"])
def test_small_loads_extend(kind: str, qualifiers: str):
    width = int(kind[1:])
    x, y = RNG.integers(0, 2**width, 32).astype(f"u{width // 8}"), np.zeros(32, np.uint32)
    launch(
        f"mad.wide.u32 %rd3, %r1, {width // 8}, %rd1; ld.global{qualifiers}.{kind} %r2, [%rd3];"
        "mad.wide.u32 %rd4, %r1, 4, %rd2; st.global.u32 [%rd4], %r2;", x, y,
    )  # fmt: skip
    assert y.tolist() == [(signed(int(v), width) if kind[0] == "s" else int(v)) % 2**32 for v in x]


@pytest.mark.parametrize(("kind", "count"), [("u8", 4), ("b16", 2), ("b16", 4), ("b32", 2), ("b32", 4), ("b64", 2)])
def test_vectors_move_in_order(kind: str, count: int):
    size = int(kind[1:]) // 8
    register = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}[size]
    names = [f"{register}{10 + n}" for n in range(count)]
    x, y = aligned(32 * count * size, np.uint8), aligned(32 * count * size, np.uint8)
    x[:] = RNG.integers(0, 256, len(x))
    launch(
        f"mad.wide.u32 %rd3, %r1, {count * size}, %rd1; mad.wide.u32 %rd4, %r1, {count * size}, %rd2;"
        f"ld.global.v{count}.{kind} {{{', '.join(names)}}}, [%rd3];"
        f"st.global.wb.v{count}.{kind} [%rd4], {{{', '.join(reversed(names))}}};", x, y,
    )  # fmt: skip
    np.testing.assert_array_equal(y.reshape(32, count, size), x.reshape(32, count, size)[:, ::-1])


def test_a_cache_policy_changes_nothing():
    x, y = RNG.integers(0, 2**32, 32, dtype=np.uint32), np.zeros(32, np.uint32)
    launch(
        "createpolicy.fractional.L2::evict_first.b64 %rd9, 1.0; mad.wide.u32 %rd3, %r1, 4, %rd1; mad.wide.u32 %rd4, %r1, 4, %rd2;"
        "prefetch.global.L2 [%rd3]; ld.global.L1::evict_first.L2::cache_hint.b32 {%r2}, [%rd3+0], %rd9;"
        "st.global.L2::cache_hint.b32 [%rd4], {%r2}, %rd9;", x, y,
    )  # fmt: skip
    np.testing.assert_array_equal(x, y)


def test_generic_addresses_reach_every_space():
    """A third of the threads each looks at global, shared and local memory through one instruction."""
    x, y = np.arange(100, 196, dtype=np.uint32), np.zeros(96, np.uint32)
    launch(
        ".local .align 8 .b8 mine[16]; .shared .align 4 .b8 ours[512];"
        "mad.wide.u32 %rd3, %r1, 4, %rd1; mad.wide.u32 %rd4, %r1, 4, %rd2;"
        "mov.u64 %rd5, mine; add.s32 %r9, %r1, 1000; st.local.u32 [%rd5+8], %r9;"
        "cvta.local.u64 %rd6, %rd5; add.u64 %rd6, %rd6, 8;"
        "mov.u32 %r3, ours; mad.lo.u32 %r3, %r1, 4, %r3; add.s32 %r8, %r1, 2000; st.shared.u32 [%r3], %r8; cvt.u64.u32 %rd7, %r3;"
        "cvta.shared.u64 %rd7, %rd7; rem.u32 %r4, %r1, 3; setp.eq.u32 p, %r4, 1; setp.eq.u32 q, %r4, 2;"
        "cvta.to.global.u64 %rd8, %rd3; selp.b64 %rd8, %rd6, %rd8, p; selp.b64 %rd8, %rd7, %rd8, q; ld.u32 %r5, [%rd8];"
        "isspacep.shared q, %rd8; @q add.u32 %r5, %r5, 10000; st.u32 [%rd4], %r5;", x, y, threads=96,
    )  # fmt: skip
    i = np.arange(96)
    np.testing.assert_array_equal(y, np.choose(i % 3, [100 + i, 1000 + i, 12000 + i]))


def test_module_variables():
    y = np.zeros(32, np.uint32)
    module = ".const .align 4 .b8 table[16] = {1, 0, 0, 0, 2, 0, 0, 0, 255};\n.global .align 4 .u32 words[2] = {7, 0x10};\n"
    body = (
        "and.b32 %r2, %r1, 3; mov.u64 %rd3, table; mad.wide.u32 %rd3, %r2, 4, %rd3; ld.const.u32 %r3, [%rd3];"
        "ld.global.u32 %r4, [words+4]; add.u32 %r3, %r3, %r4; mad.wide.u32 %rd4, %r1, 4, %rd1; st.global.u32 [%rd4], %r3;"
    )
    launch(body, y, module=module)
    np.testing.assert_array_equal(y, np.tile([1, 2, 255, 0], 8) + 16)


def test_parameters_by_register_and_in_structs():
    text = (
        f"{HEAD}.visible .entry k(.param .u64 .ptr .global .align 16 k_param_0, .param .align 8 .b8 k_param_1[24])\n"
        "{ .reg .b32 %r<9>; .reg .b16 %rs<9>; .reg .b64 %rd<9>; ld.param.u64 %rd1, [k_param_0]; mov.u32 %r1, %tid.x;"
        "mov.b64 %rd2, k_param_1; mad.wide.u32 %rd2, %r1, 4, %rd2; ld.param.u32 %r2, [%rd2+8];"
        "ld.param.v2.u32 {%r3, %r4}, [k_param_1]; ld.param.s8 %rs1, [k_param_1+23]; cvt.s32.s16 %r5, %rs1;"
        "add.s32 %r2, %r2, %r4; add.s32 %r2, %r2, %r5; mad.wide.u32 %rd1, %r1, 4, %rd1; st.global.u32 [%rd1], %r2; ret; }"
    )
    y = np.zeros(3, np.int32)
    run(Program(text), "k", (1, 1, 1), (3, 1, 1), [y, struct.pack("<iiiii3xb", 5, 100, 1, 2, 3, -1)])
    np.testing.assert_array_equal(y, [100, 101, 102])


def test_a_parameter_by_its_address_in_32_bits():
    """As LLVM has it for a choice between two parameters."""
    text = (
        f"{HEAD}.visible .entry k(.param .u64 .ptr .global .align 16 k_param_0, .param .u32 k_param_1, .param .u32 k_param_2)\n"
        "{ .reg .pred %p<3>; .reg .b32 %r<9>; .reg .b64 %rd<9>; ld.param.u64 %rd1, [k_param_0]; mov.u32 %r1, %tid.x;"
        "setp.eq.s32 %p1, %r1, 1; mov.b32 %r2, k_param_1; mov.b32 %r3, k_param_2; selp.b32 %r4, %r3, %r2, %p1;"
        "ld.param.b32 %r5, [%r4]; mad.wide.u32 %rd1, %r1, 4, %rd1; st.global.u32 [%rd1], %r5; ret; }"
    )
    y = np.zeros(3, np.int32)
    run(Program(text), "k", (1, 1, 1), (3, 1, 1), [y, struct.pack("<i", 5), struct.pack("<i", 7)])
    np.testing.assert_array_equal(y, [5, 7, 5])


# ---- cp.async -----------------------------------------------------------------------------------------------------------------

COPY_HEAD = (
    ".shared .align 16 .b8 tile[2048]; mov.u32 %r2, tile; mad.lo.u32 %r3, %r1, 16, %r2; mad.wide.u32 %rd3, %r1, 16, %rd1;"
    "mad.wide.u32 %rd4, %r1, 16, %rd2; st.shared.v4.b32 [%r3], {-1, -1, -1, -1}; bar.sync 0;"
)
COPY_TAIL = "ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r3]; st.global.v4.b32 [%rd4], {%r10, %r11, %r12, %r13};"


def copied(copy: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = aligned(512, np.uint8), aligned(512, np.uint8)
    x[:] = RNG.integers(0, 256, 512)
    launch(COPY_HEAD + copy + "cp.async.commit_group; cp.async.wait_group 0;" + COPY_TAIL, x, y)
    return x.reshape(32, 16), y.reshape(32, 16)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies_of_each_size(size: int):
    x, y = copied(f"cp.async.ca.shared.global [%r3], [%rd3], {size};")
    np.testing.assert_array_equal(y[:, :size], x[:, :size])
    assert (y[:, size:] == 255).all()


def test_what_the_source_lacks_is_zero():
    x, y = copied("rem.u32 %r4, %r1, 17; cp.async.cg.shared.global.L2::128B [%r3+0], [%rd3+0], 0x10, %r4;")
    given = np.arange(32)[:, None] % 17
    np.testing.assert_array_equal(y, np.where(np.arange(16) < given, x, 0))


def test_an_ignored_source_is_zero():
    x, y = copied("setp.lt.u32 p, %r1, 9; cp.async.ca.shared::cta.global [%r3], [%rd3], 8, p;")
    np.testing.assert_array_equal(y[:, :8], np.where(np.arange(32)[:, None] < 9, 0, x[:, :8]))


def test_a_source_of_no_bytes_may_lie_anywhere():
    y = aligned(512, np.uint8)
    launch(COPY_HEAD + "cp.async.cg.shared.global [%r3], [0], 16, 0; cp.async.wait_all;" + COPY_TAIL, aligned(512, np.uint8), y)
    assert not y.any()


def groups(wait: str) -> None:
    two = "cp.async.cg.shared.global [%r3], [%rd3], 16; cp.async.commit_group;"
    two += "cp.async.cg.shared.global [%r3+1024], [%rd3], 16; cp.async.commit_group;"
    launch(COPY_HEAD + two + wait + COPY_TAIL, aligned(512, np.uint8), aligned(512, np.uint8))


def test_a_wait_is_for_the_older_groups():
    groups("cp.async.wait_group 1;")
    with pytest.raises(InFlight):
        groups("cp.async.wait_group 2;")


def test_writing_where_a_copy_will_land():
    with pytest.raises(InFlight):
        copied("cp.async.ca.shared.global [%r3], [%rd3], 4; st.shared.u32 [%r3], %r1;")


def test_copies_to_one_place_race():
    with pytest.raises(Race, match="same place"):
        copied("cp.async.ca.shared.global [%r2], [%rd3], 16;")


# ---- atomics ------------------------------------------------------------------------------------------------------------------


def cas(found: int, expected: int, new: int) -> int:
    return new if found == expected else found


@pytest.mark.parametrize("space", ["global", "shared", "generic"])
@pytest.mark.parametrize(
    ("operation", "kind", "change"),
    [
        ("add", "u32", lambda a, b: (a + b) % 2**32),
        ("min", "s32", lambda a, b: min(a, b, key=lambda v: signed(v, 32))),
        ("max", "u32", max),
        ("and", "b32", lambda a, b: a & b),
        ("or", "b32", lambda a, b: a | b),
        ("xor", "b32", lambda a, b: a ^ b),
        ("exch", "b32", lambda a, b: b),
        ("inc", "u32", lambda a, b: 0 if a >= b else a + 1),
        ("dec", "u32", lambda a, b: b if a == 0 or a > b else a - 1),
        ("cas", "b32", lambda a, b: cas(a, b, 77)),
        ("add", "u64", lambda a, b: (a + b) % 2**64),
        ("max", "s64", lambda a, b: max(a, b, key=lambda v: signed(v, 64))),
    ],
)
def test_atomics_take_turns(operation: str, kind: str, change, space: str):
    """Several threads change each of four words; the emulator lets them do so in the order of their numbers."""
    size = int(kind[1:]) // 8
    words, operands = (RNG.integers(0, 2 ** (8 * size) - 1, n, dtype=f"u{size}") for n in (4, 32))
    if operation in ("inc", "dec", "cas"):
        words, operands = words % 5, operands % 5
    start, found = words.copy(), np.zeros(32, f"u{size}")
    r = "%r" if size == 4 else "%rd"
    body = (
        f".shared .align 8 .b8 here[64]; and.b32 %r2, %r1, 3;"
        f"mad.wide.u32 %rd5, %r1, {size}, %rd2; ld.global.b{8 * size} {r}10, [%rd5];"
        f"mad.wide.u32 %rd4, %r2, {size}, %rd1; mad.wide.u32 %rd6, %r1, {size}, %rd3;"
    )
    more = ", 77" if operation == "cas" else ""
    if space == "shared":
        body += (
            f"mov.u64 %rd7, here; mad.wide.u32 %rd7, %r2, {size}, %rd7;"
            f"ld.global.b{8 * size} {r}12, [%rd4]; st.shared.b{8 * size} [%rd7], {r}12;"
            f"bar.sync 0; atom.shared.{operation}.{kind} {r}11, [%rd7], {r}10{more}; bar.sync 0;"
            f"ld.shared.b{8 * size} {r}12, [%rd7]; st.global.b{8 * size} [%rd4], {r}12;"
        )
    else:
        word = ".global.gpu.relaxed" if space == "global" else ""
        body += f"atom{word}.{operation}.{kind} {r}11, [%rd4], {r}10{more};"
    launch(body + f"st.global.b{8 * size} [%rd6], {r}11;", words, operands, found)
    wanted = [int(v) for v in start]
    for i, operand in enumerate(operands):
        assert found[i] == wanted[i % 4]
        wanted[i % 4] = change(wanted[i % 4], int(operand))
    assert [int(v) for v in words] == wanted


@pytest.mark.parametrize(("kind", "dtype"), [("f32", np.float32), ("f64", np.float64), ("f16x2", np.float16)])
def test_reductions_of_floats(kind: str, dtype: type):
    words = np.zeros(2, dtype)
    operands = np.repeat(RNG.integers(-8, 8, 64), 1).astype(dtype)
    size, operation = (8, "add") if kind == "f64" else (4, "add.noftz" if kind == "f16x2" else "add")
    r = "%rd" if size == 8 else "%r"
    launch(
        f"mad.wide.u32 %rd3, %r1, {size}, %rd2; ld.global.b{8 * size} {r}10, [%rd3];"
        f"red.global.{operation}.{kind} [%rd1], {r}10;",
        words, operands,
    )  # fmt: skip
    if kind == "f16x2":
        np.testing.assert_array_equal(words, operands.reshape(32, 2).sum(0))
    else:
        assert words[0] == operands[:32].sum() and words[1] == 0


# ---- what the parser refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("frobnicate.u32 %r2, %r1;", "frobnicate"),
        ("add.frob.u32 %r2, %r1, %r1;", ".frob"),
        ("add.u32 %r2, %rs1, %r1;", "too narrow"),
        ("add.u32 %r2, %missing, 1;", "operand"),
        ("bra NOWHERE;", "no such label"),
        ("mov.u32 %r2, nothing;", "no such variable"),
        ("setp.ltu.s32 p, %r1, 1;", "comparison"),
        ("ld.global.v4.b64 {%rd3, %rd4, %rd5, %rd6}, [%rd1];", "16 bytes"),
        ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r2}, {%r2}, {%r2}, {%r2};", "m16n8k4"),
        ("cp.async.ca.shared.global [%r1], [%rd1], 5;", "5 bytes"),
    ],
)
def test_what_isnt_known_is_refused_at_once(body: str, why: str):
    with pytest.raises(Unsupported, match=why) as caught:
        kernel("mov.u32 %r3, 0;\n" + body)
    assert caught.value.line == 6 and body.split()[0] in caught.value.instruction


def test_scopes_of_inline_assembly_have_names_of_their_own():
    """Registers of one name in three scopes, and a loop in each inner one with a label of one name."""
    y = np.zeros(32, np.uint32)
    inner = "{{ .reg .b32 t; .reg .pred again; mov.u32 t, {0};"
    inner += "LOOP: sub.u32 t, t, 1; add.u32 %r3, %r3, {1}; setp.ne.u32 again, t, 0; @again bra LOOP; }}"
    body = ".reg .b32 t; mov.u32 t, 1000; mov.u32 %r3, 0;" + inner.format(3, 10) + inner.format(2, 1)
    launch(body + "add.u32 %r3, %r3, t; mad.wide.u32 %rd3, %r1, 4, %rd1; st.global.u32 [%rd3], %r3;", y)
    assert (y == 1032).all()


def test_launches_that_no_gpu_takes():
    program, memory = kernel("", 1), Memory()
    with pytest.raises(ValueError, match="'other' came, the module has k"):
        program.run("other", (1, 1, 1), (1, 1, 1), 0, [], memory)
    with pytest.raises(ValueError, match="0 parameters came, it takes 1"):
        program.run("k", (1, 1, 1), (1, 1, 1), 0, [], memory)
    with pytest.raises(ValueError, match="4 bytes came for k_param_0, which has 8"):
        program.run("k", (1, 1, 1), (1, 1, 1), 0, [bytes(4)], memory)
    with pytest.raises(ValueError, match="at most 1024"):
        program.run("k", (1, 1, 1), (2048, 1, 1), 0, [bytes(8)], memory)
    bound = Program(f"{HEAD}.visible .entry k()\n.maxntid 64, 2, 1\n{{ ret; }}\n.visible .entry w()\n.reqntid 128\n{{ ret; }}")
    with pytest.raises(ValueError, match="at most 128"):
        bound.run("k", (1, 1, 1), (129, 1, 1), 0, [], memory)
    with pytest.raises(ValueError, match=r"\(64, 1, 1\) came, w was compiled for \(128, 1, 1\)"):
        bound.run("w", (1, 1, 1), (64, 1, 1), 0, [], memory)


def test_the_nearest_range_is_named():
    x, y = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    with pytest.raises(
        OutOfBounds, match=r"4 bytes at 0x[0-9a-f]+ must not be read: 4 bytes before 'argument [01]' \(128 bytes\)"
    ):
        launch("ld.global.u32 %r2, [%rd1+-4];", x, y)
    with pytest.raises(OutOfBounds, match="no range is allowed|bytes before"):
        launch("ld.global.u32 %r2, [0];", x, y)
