"""Words of Triton kernels that draw dropout's masks, in the emulator, against the reference: every word, every bit."""

from __future__ import annotations

import pytest
import torch
from emulation import doors

from peftk.ops.philox_dropout.reference import philox_words

if why := doors.why_not("triton-ptx"):
    pytest.skip(why, allow_module_level=True)

import triton
import triton.language as tl

from peftk.ops import triton_words

N = 256  # counters of a launch
SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 0x9E3779B97F4A7C15 >> 1, 2**63 - 2**32, 2**63 - 1]
COUNTERS = [0, 2**30 - 7, 2**32 - N // 2, 2**34 + 3, 2**45 - 100, 2**61 - N]  # the first of N; elements are four times as many


@triton.jit(do_not_specialize=["first", "seed"])
def words_kernel(out, first: tl.int64, seed: tl.int64, N: tl.constexpr):
    i = tl.arange(0, N)
    w0, w1, w2, w3 = triton_words.philox(first + i, seed)
    tl.store(out + 4 * i, w0)
    tl.store(out + 4 * i + 1, w1)
    tl.store(out + 4 * i + 2, w2)
    tl.store(out + 4 * i + 3, w3)


@triton.jit(do_not_specialize=["row", "first", "c", "drop_below", "seed"])
def keeps_kernel(
    out, row: tl.int64, first: tl.int64, c: tl.int64, drop_below: tl.uint32, seed: tl.int64, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, FOURS: tl.constexpr,
):  # fmt: skip
    """out (ROWS, COLUMNS) uint8: rows from ``row`` on, columns from ``first`` on of a matrix with c columns."""
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    keep = triton_words.keeps_tile(row + i, first, c, drop_below, seed, COLUMNS, FOURS)
    tl.store(out + i[:, None] * COLUMNS + j[None, :], keep.to(tl.uint8))


def launch(kernel, *arguments, **options) -> None:
    doors.door("triton-ptx").launch(kernel, (1,), *arguments, **options, num_warps=4, **triton_words.EXACT)


@pytest.mark.parametrize("seed", SEEDS)
def test_philox_is_the_references(seed):
    for first in COUNTERS:
        out = torch.zeros(N, 4, dtype=torch.int32)
        launch(words_kernel, out, first, seed, N=N)
        expected = philox_words(torch.arange(first, first + N), seed)
        assert torch.equal(out.to(torch.int64) & 0xFFFFFFFF, expected)


@pytest.mark.parametrize("fours", [True, False])
@pytest.mark.parametrize("seed", [3, 2**63 - 12345])
def test_tiles_keep_what_the_reference_keeps(seed, fours):
    """Rows whose elements lie beyond 2^32 and 2^34; without ``fours`` no row but one in four starts at a multiple of four."""
    rows, columns, p = 8, 32, int(0.3 * 2**32)
    for row, first, c in ((0, 0, 32), (2**27 - 3, 64, 128), (2**24 + 1, 4096, 8192), (2**31 + 5, 2**20, 2**21 + 4)):
        if not fours:
            first, c = first + 3, c + 1
        out = torch.zeros(rows, columns, dtype=torch.uint8)
        launch(keeps_kernel, out, row, first, c, p, seed, ROWS=rows, COLUMNS=columns, FOURS=fours)
        element = (row + torch.arange(rows))[:, None] * c + (first + torch.arange(columns))[None, :]
        word = philox_words(element.view(-1) // 4, seed).gather(1, element.view(-1, 1) % 4).view(rows, columns)
        assert torch.equal(out.bool(), word >= p)


@pytest.mark.parametrize("drop_below", [0, 1, 2**31, 2**32 - 1])
def test_the_threshold_is_unsigned(drop_below):
    out = torch.zeros(8, 32, dtype=torch.uint8)
    launch(keeps_kernel, out, 0, 0, 32, drop_below, 5, ROWS=8, COLUMNS=32, FOURS=True)
    assert torch.equal(out.bool().view(-1), philox_words(torch.arange(64), 5).view(-1) >= drop_below)
