"""y = x W^T + bias + scale * s b^T for several W of one k in one launch.

x (m, k), W (n, k) in 4 bits, s (m, r), b (n, r). A program makes a tile of (TOKENS, ROWS) outputs: fp32 sums start from the
low-rank branch, then W is decoded in registers, DEPTH columns at a time, and multiplied. Rows of W and x beyond the last are the
last one again: no masks in the loop, and they aren't stored.

A split output has several runs of the inner dimension, each of which writes its fp32 sums; triton_sums.py adds them in order.
What comes out depends on no grid.
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
from peftk.ops.triton_words import locate, pick


@triton.jit(do_not_specialize=["m"])
def nf4_linear_forward(
    x,  # (m, k)
    x_stride,  # elements from row to row
    packed,  # of each output: (ceil(n * k / 2),) uint8
    absmax,  # (blocks,) fp32, or uint8 codes where double quantised
    absmax_scale,  # (ceil(blocks / NESTED_BLOCK),) fp32 or None
    absmax_offset,  # () fp32 or None
    bias,  # (n,) or None
    out,  # (m, n) in x's dtype, or (split, m, n) fp32
    s,  # (m, r) or None
    b,  # (n, r) or None
    r,  # 0 without a low-rank branch
    scale,  # of the low-rank branch
    n,  # rows of W
    block_bits,  # log2 of a block's elements
    split,  # runs of k
    firsts,  # program_id(1) where it begins
    values8,  # (256,) fp32 or None
    values4,  # (16,) fp32
    m,
    k,
    IN_WORDS: tl.constexpr,  # see triton_weight.py
    TOKENS: tl.constexpr,  # rows of x a tile
    ROWS: tl.constexpr,  # of W
    DEPTH: tl.constexpr,  # columns of W and x a round
    STEP: tl.constexpr,  # of the low rank
):
    which, place = locate(tl.program_id(1), firsts)
    packed, absmax, block_bits = pick(packed, which), pick(absmax, which), pick(block_bits, which)
    absmax_scale, offset = pick(absmax_scale, which), offset_of(pick(absmax_offset, which))
    rows_of_w, runs, out, bias = pick(n, which), pick(split, which), pick(out, which), pick(bias, which)
    tiles = tl.cdiv(rows_of_w, ROWS)
    tile, run = place % tiles, place // tiles
    table, table8 = tl.load(values4 + tl.arange(0, 16)), table_of_8(values8)
    if IN_WORDS:
        k = k // PIECE * PIECE  # says that it is a multiple: wide loads

    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tile * ROWS + tl.arange(0, ROWS)
    safe_token, safe_row = tl.minimum(token, m - 1).to(tl.int64), tl.minimum(row, rows_of_w - 1).to(tl.int64)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    if s[0] is not None:
        left, right, width = pick(s, which), pick(b, which), pick(r, which)
        own = tl.where(run == 0, width, 0)
        total = low_rank(left, right, width, 1, safe_token, safe_row, own, TOKENS, ROWS, STEP) * pick(scale, which)

    x_row, w_row = x + (safe_token * x_stride)[:, None], safe_row * k
    rounds = tl.cdiv(k, DEPTH)
    each = tl.cdiv(rounds, runs)
    for step in range(run * each, tl.minimum(run * each + each, rounds)):
        column = step * DEPTH + tl.arange(0, DEPTH)
        if IN_WORDS:
            x_tile = tl.load(x_row + column[None, :])
            w = tile_in_words(packed, table, absmax, absmax_scale, offset, table8, block_bits, w_row + step * DEPTH, k, DEPTH)
        else:
            x_tile = tl.load(x_row + column[None, :], mask=(column < k)[None, :], other=0.0)
            element = w_row[:, None] + tl.minimum(column, k - 1)[None, :]
            w = tile_by_elements(packed, table, absmax, absmax_scale, offset, table8, block_bits, element)
        total = add_product(total, x_tile, tl.trans(w.to(x_tile.dtype)), DEPTH)

    if bias is not None:
        total += tl.load(bias + safe_row, mask=(row < rows_of_w) & (run == 0), other=0.0).to(tl.float32)[None, :]
    at = out + (run.to(tl.int64) * m + token[:, None].to(tl.int64)) * rows_of_w + row[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(token < m)[:, None] & (row < rows_of_w)[None, :])
