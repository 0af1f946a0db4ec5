"""Threads that need each other in the emulator: shuffles, votes, barriers, divergence; and what a launch counts."""

from __future__ import annotations

import numpy as np
import pytest

from emulation.one_instruction import kernel, launch, run
from emulation.ptx import Deadlock, Race, schedule

RNG = np.random.default_rng(0)
IN = "mad.wide.u32 %rd3, %r1, 4, %rd1; mad.wide.u32 %rd4, %r1, 4, %rd2; ld.global.u32 %r2, [%rd3];"
OUT = "st.global.u32 [%rd4], %r3;"


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The PTX ISA's own pseudo-code: the source lane, and whether it lies inside."""
    b, clamp, segment = b & 31, c & 31, c >> 8 & 31
    highest, lowest = (lane & segment) | (clamp & ~segment & 31), lane & segment
    j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment)}[mode]
    inside = j >= highest if mode == "up" else j <= highest
    return (j if inside else lane), inside


@pytest.mark.parametrize("width", [32, 16, 8])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str, width: int):
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    for b in (0, 1, 5, 16, 31):
        x, y = RNG.integers(0, 2**30, 64, dtype=np.uint32), np.zeros(64, np.uint32)
        launch(f"{IN} shfl.sync.{mode}.b32 %r3|p, %r2, {b}, {c}, -1; @p add.u32 %r3, %r3, 1; {OUT}", x, y, threads=64)
        for i in range(64):
            source, inside = shuffled(mode, i % 32, b, c)
            assert y[i] == x[i // 32 * 32 + source] + inside


@pytest.mark.parametrize("threads", [32, 48])
def test_collectives_by_mask(threads: int):
    """Even and odd lanes come separately, each with the mask of its own."""
    x, y = RNG.integers(0, 4, threads, dtype=np.uint32), np.zeros(threads, np.uint32)
    body = (
        f"{IN} and.b32 %r4, %r1, 1; setp.eq.u32 p, %r4, 0; @p bra EVEN; mov.u32 %r5, 0xAAAAAAAA; bra TOGETHER;"
        "EVEN: mov.u32 %r5, 0x55555555;"
        "redux.sync.add.u32 %r6, %r2, %r5; match.any.sync.b32 %r7, %r2, %r5; vote.sync.ballot.b32 %r8, p, %r5; bra STORE;"
        "TOGETHER: redux.sync.add.u32 %r6, %r2, %r5; match.any.sync.b32 %r7, %r2, %r5; vote.sync.ballot.b32 %r8, p, %r5;"
        f"STORE: xor.b32 %r3, %r7, %r8; mad.lo.u32 %r3, %r6, 1000003, %r3; {OUT}"
    )
    launch(body, x, y, threads=threads)
    for i in range(threads):
        mates = [j for j in range(i // 32 * 32, min(threads, i // 32 * 32 + 32)) if j % 2 == i % 2]
        total = int(sum(x[j] for j in mates))
        match = sum(1 << j % 32 for j in mates if x[j] == x[i])
        ballot = 0 if i % 2 else sum(1 << j % 32 for j in mates)
        assert y[i] == (total * 1000003 + (match ^ ballot)) % 2**32


def test_lanes_wait_for_their_mask():
    """One lane goes a long way round before it comes to the shuffle."""
    x, y = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    launch(
        f"{IN} setp.ne.u32 p, %r1, 7; mov.u32 %r4, 0; @p bra HERE;"
        f"LOOP: add.u32 %r4, %r4, 1; setp.lt.u32 q, %r4, 50; @q bra LOOP;"
        f"HERE: shfl.sync.idx.b32 %r3, %r4, 7, 31, -1; {OUT}", x, y,
    )  # fmt: skip
    assert (y == 50).all()


def test_the_first_lane_is_elected_and_masks_name_lanes():
    x, y = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    launch(
        f"{IN} elect.sync %r3|p, 0xFFFFFFFF; @p add.u32 %r3, %r3, 100; mov.u32 %r4, %lanemask_lt; popc.b32 %r4, %r4;"
        f"add.u32 %r3, %r3, %r4; {OUT}", x, y,
    )  # fmt: skip
    assert y.tolist() == [100, *range(1, 32)]


def test_hints_and_clocks_change_nothing():
    x, y = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    launch(
        f"{IN} mov.u64 %rd9, %clock64; mov.u32 %r9, %smid; nanosleep.u32 20; membar.gl; fence.acq_rel.gpu; bar.warp.sync -1;"
        f"discard.global.L2 [%rd3], 128; mov.u64 %rd10, %globaltimer; setp.ge.u64 p, %rd10, %rd9; selp.u32 %r3, %r2, 0, p; {OUT}",
        x, y, threads=64,
    )  # fmt: skip
    np.testing.assert_array_equal(x, y)


def test_what_a_launch_looks_like_from_inside():
    names = ("%laneid", "%warpid", "%nwarpid", "%ntid.x", "%nctaid.x", "%dynamic_smem_size", "%lanemask_ge")
    for name, define in zip(names, (lambda i: i % 32, lambda i: i // 32, lambda i: 3, lambda i: 96, lambda i: 1, lambda i: 48,
                                    lambda i: 2**32 - 2 ** (i % 32)), strict=True):  # fmt: skip
        x, y = np.zeros(96, np.uint32), np.zeros(96, np.uint32)
        launch(f"{IN} mov.u32 %r3, {name}; {OUT}", x, y, threads=96, shared_bytes=48)
        assert y.tolist() == [define(i) for i in range(96)], name


def test_a_jump_by_index():
    x, y = RNG.integers(0, 3, 32, dtype=np.uint32), np.zeros(32, np.uint32)
    launch(
        f"{IN} targets: .branchtargets A, B, C; brx.idx %r2, targets; A: mov.u32 %r3, 10; bra END; B: mov.u32 %r3, 20; bra END;"
        f"C: mov.u32 %r3, 30; END: {OUT}", x, y,
    )  # fmt: skip
    np.testing.assert_array_equal(y, 10 * x + 10)


@pytest.mark.parametrize(("mode", "wanted"), [("popc.u32", 96 // 3), ("and.pred", 0), ("or.pred", 1)])
def test_barriers_that_vote(mode: str, wanted: int):
    x, y = np.zeros(96, np.uint32), np.zeros(96, np.uint32)
    result = "%r3" if mode == "popc.u32" else "q"
    tail = "" if mode == "popc.u32" else "selp.u32 %r3, 1, 0, q;"
    launch(
        f"{IN} rem.u32 %r4, %r1, 3; setp.eq.u32 p, %r4, 0; barrier.cta.red.{mode} {result}, 0, p; {tail} {OUT}", x, y, threads=96
    )
    assert (y == wanted).all()


def halves(first: str, second: str):
    """Warps 0 and 1 exchange through shared memory, warps 2 and 3 too, at barriers of their own."""
    x, y = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    launch(
        f".shared .align 4 .b8 tile[512]; {IN} mov.u32 %r5, tile; mad.lo.u32 %r6, %r1, 4, %r5; st.shared.u32 [%r6], %r2;"
        f"setp.lt.u32 p, %r1, 64; @p bra LOW; bar.sync {first}; bra READ; LOW: bar.sync {second};"
        f"READ: xor.b32 %r7, %r1, 32; mad.lo.u32 %r6, %r7, 4, %r5; ld.shared.u32 %r3, [%r6]; {OUT}", x, y, threads=128,
    )  # fmt: skip
    np.testing.assert_array_equal(y, np.arange(128) ^ 32)


def test_barriers_for_some_warps():
    halves("1, 64", "2, 64")


def test_barriers_that_are_never_complete():
    with pytest.raises(Deadlock, match="64 of the block's 64 live threads wait at barriers"):
        halves("1, 64", "2, 96")


def test_a_barrier_orders_nothing_for_those_who_did_not_wait():
    """Warps 2 and 3 meet at barrier 1, then read what warps 0 and 1 wrote."""
    with pytest.raises(Race, match="writes what thread|reads what thread"):
        launch(
            f".shared .align 4 .b8 tile[512]; {IN} mov.u32 %r5, tile; mad.lo.u32 %r6, %r1, 4, %r5; setp.lt.u32 p, %r1, 64;"
            "@p bra WRITE; mov.u32 %r3, 0; bar.sync 1, 64; bra READ; WRITE: st.shared.u32 [%r6], %r2; mov.u32 %r3, 1; bra END;"
            f"READ: xor.b32 %r7, %r1, 64; mad.lo.u32 %r6, %r7, 4, %r5; ld.shared.u32 %r3, [%r6]; END: {OUT}",
            np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32), threads=128,
        )  # fmt: skip


def test_a_loop_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(schedule, "ENDLESS", 1000)
    with pytest.raises(Deadlock, match="a loop that doesn't end"):
        launch("LOOP: bra LOOP;", np.zeros(1, np.uint32))


def test_blocks_beyond_one_batch_and_three_dimensions():
    y = np.zeros((3, 5, 700, 4, 2, 8), np.uint32)
    digits = (
        "%ctaid.z",
        "%nctaid.y",
        "%ctaid.y",
        "%nctaid.x",
        "%ctaid.x",
        "%ntid.z",
        "%tid.z",
        "%ntid.y",
        "%tid.y",
        "%ntid.x",
        "%tid.x",
    )
    body = f"mov.u32 %r2, {digits[0]};"
    for base, digit in zip(digits[1::2], digits[2::2], strict=True):
        body += f"mov.u32 %r3, {base}; mov.u32 %r4, {digit}; mad.lo.u32 %r2, %r2, %r3, %r4;"
    body += "mad.wide.u32 %rd2, %r2, 4, %rd1; add.u32 %r2, %r2, 1; st.global.u32 [%rd2], %r2;"
    report = run(kernel(body, 1), "k", (700, 5, 3), (8, 2, 4), [y])
    np.testing.assert_array_equal(y.ravel(), np.arange(1, y.size + 1))
    assert report.threads == y.size == report.instructions["st.global.u32"]
    assert report.bytes_stored["global"] == y.nbytes


def test_predicated_lanes_count_only_where_they_act():
    x, y = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    report = launch(f"{IN} setp.lt.u32 p, %r1, 10; @p add.u32 %r2, %r2, 1; mov.u32 %r3, %r2; {OUT}", x, y, threads=64)
    assert report.instructions["add.u32"] == 10 and report.instructions["mad.wide.u32"] == 2 * 64
    assert report.bytes_loaded["global"] == 256 and report.accesses[("global", "load", 4)] == 64


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (64, 32), (0, 1)])
def test_sectors_of_a_request(stride: int, sectors: int):
    raw = np.zeros(32 * 64 + 128, np.uint8)
    x, y = raw[-raw.ctypes.data % 128 :][: 32 * 64], np.zeros(64, np.uint32)
    report = launch(f"mad.wide.u32 %rd3, %r1, {stride}, %rd1; ld.global.u32 %r2, [%rd3];", x, y, traffic=True)
    assert report.traffic.requests == 1 and report.traffic.sectors == sectors


@pytest.mark.parametrize(
    ("access", "scale", "wavefronts", "conflicts"),
    [
        ("b32", 4, 1, 0),
        ("b32", 8, 2, 1),
        ("b32", 128, 32, 31),
        ("b32", 0, 1, 0),
        ("v4.b32", 16, 4, 0),
        ("v2.b32", 16, 4, 2),
        ("b16", 2, 1, 0),
    ],
)
def test_bank_conflicts(access: str, scale: int, wavefronts: int, conflicts: int):
    registers = {"b32": "%r1", "b16": "%rs1", "v2.b32": "{1, 1}", "v4.b32": "{1, 1, 1, 1}"}[access]
    value = "%r5" if scale == 0 else registers  # one value where all write to one place
    body = f".shared .align 16 .b8 tile[4096]; mov.u32 %r5, tile; mad.lo.u32 %r6, %r1, {scale}, %r5;"
    body += f"st.shared.{access} [%r6], {value};"
    report = launch(body, np.zeros(1, np.uint32), np.zeros(1, np.uint32), traffic=True)
    assert (report.traffic.wavefronts, report.traffic.conflicts) == (wavefronts, conflicts)
