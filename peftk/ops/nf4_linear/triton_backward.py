"""dx = sum of dy W + D(t a) over several W of one k in one launch; D is dropout.

dy (m, n), W (n, k) in 4 bits, t (m, r), a (r, k), dx (m, k). A program makes a tile of (TOKENS, COLUMNS): fp32 sums start from
the low-rank branches, then rows of W, DEPTH at a time, weight after weight in one loop, are decoded in registers and multiplied.
Rows of W and dy beyond the last are the last one again: there dy's columns are 0.

Split, a run of the rounds writes its fp32 sums, and triton_sums.py adds the runs in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peftk.ops.nf4_linear.triton_weight import (
    PIECE,
    add_product,
    low_rank,
    offset_of,
    table_of_8,
    tile_by_elements,
    tile_in_words,
)
from peftk.ops.triton_words import keeps_tile, pick, unsealed


@triton.jit(do_not_specialize=["m", "rounds", "split"])
def nf4_linear_backward(
    dy,  # of each weight: (m, n)
    dy_stride,  # elements from row to row
    packed,  # (ceil(n * k / 2),) uint8
    absmax,  # (blocks,) fp32, or uint8 codes where double quantised
    absmax_scale,  # (ceil(blocks / NESTED_BLOCK),) fp32 or None
    absmax_offset,  # () fp32 or None
    t,  # (m, r) or None
    a,  # (r, k) or None
    r,  # 0 without a low-rank branch
    drop_below,  # p * 2^32 of the dropout
    keep_scale,  # 1 / (1 - p)
    seed_low,  # 32 bits, as seed_high: sealed
    seed_high,
    n,  # rows of W
    block_bits,  # log2 of a block's elements
    firsts,  # the round with its first rows
    values8,  # (256,) fp32 or None
    values4,  # (16,) fp32
    out,  # (m, k) in dy's dtype, or (split, m, k) fp32
    rounds,  # of all weights
    split,  # runs of them
    m,
    k,
    IN_WORDS: tl.constexpr,  # see triton_weight.py
    DROPOUT: tl.constexpr,  # whether any has it
    TOKENS: tl.constexpr,  # rows of dy a tile
    COLUMNS: tl.constexpr,  # of W
    DEPTH: tl.constexpr,  # rows of W and columns of dy a round
    STEP: tl.constexpr,  # of the low rank
):
    if IN_WORDS:
        k = k // PIECE * PIECE  # says that it is a multiple: wide loads
    tiles = tl.cdiv(k, COLUMNS)
    first_column, run = tl.program_id(1) % tiles * COLUMNS, tl.program_id(1) // tiles
    table, table8 = tl.load(values4 + tl.arange(0, 16)), table_of_8(values8)

    token, column = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), first_column + tl.arange(0, COLUMNS)
    safe_token, safe_column = tl.minimum(token, m - 1).to(tl.int64), tl.minimum(column, k - 1)
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    if t[0] is not None:
        for i in tl.static_range(len(t)):
            width = tl.where(run == 0, r[i], 0)
            branch = low_rank(t[i], a[i], 1, k, safe_token, safe_column, width, TOKENS, COLUMNS, STEP)
            if DROPOUT:
                below, seed = tl.to_tensor(drop_below[i]).to(tl.uint32), (unsealed(seed_high[i]) << 32) | unsealed(seed_low[i])
                kept = keeps_tile(safe_token, first_column, k, below, seed, COLUMNS, IN_WORDS)
                branch = tl.where(kept, branch * keep_scale[i], 0.0)
            total += branch

    each = tl.cdiv(rounds, split)
    begin, end = run * each, tl.minimum(run * each + each, rounds)
    for which in range(len(n)):
        first, rows_of_w, bits = pick(firsts, which), pick(n, which), pick(block_bits, which)
        codes, scales = pick(packed, which), pick(absmax, which)
        nested, offset = pick(absmax_scale, which), offset_of(pick(absmax_offset, which))
        dy_row = pick(dy, which) + (safe_token * pick(dy_stride, which))[:, None]
        last = first + tl.cdiv(rows_of_w, DEPTH)
        for step in range(tl.maximum(begin, first) - first, tl.minimum(end, last) - first):
            row = step * DEPTH + tl.arange(0, DEPTH)
            dy_tile = tl.load(dy_row + row[None, :], mask=(row < rows_of_w)[None, :], other=0.0)
            w_row = tl.minimum(row, rows_of_w - 1).to(tl.int64) * k
            if IN_WORDS:
                left = k - first_column
                w = tile_in_words(codes, table, scales, nested, offset, table8, bits, w_row + first_column, left, COLUMNS)
            else:
                element = w_row[:, None] + safe_column[None, :]
                w = tile_by_elements(codes, table, scales, nested, offset, table8, bits, element)
            total = add_product(total, dy_tile, w.to(dy_tile.dtype), DEPTH)

    at = out + (run.to(tl.int64) * m + token[:, None].to(tl.int64)) * k + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(token < m)[:, None] & (column < k)[None, :])
