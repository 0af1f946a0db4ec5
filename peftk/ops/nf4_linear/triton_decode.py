"""A chunk of W, for a library's product: out[i, j] = round(value * scale) of W[first_row + i, first_column + j].

A program decodes a tile of (ROWS, COLUMNS); no element of W that isn't in the chunk is read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peftk.ops.nf4_linear.triton_weight import PIECE, offset_of, table_of_8, tile_by_elements, tile_in_words

# Rows in words and by elements, counted for sm_80: 9.4 instructions an element (11.2 with 16 rows); 46, and with 32 rows spills.
ROWS = {True: 32, False: 16}
COLUMNS, WARPS = 256, 4


@triton.jit(do_not_specialize=["block_bits", "first_row", "first_column", "rows"])
def nf4_linear_decode(
    packed,  # (ceil(n * k / 2),) uint8
    absmax,  # (blocks,) fp32, or uint8 codes where double quantised
    absmax_scale,  # (ceil(blocks / NESTED_BLOCK),) fp32 or None
    absmax_offset,  # () fp32 or None
    values8,  # (256,) fp32 or None
    values4,  # (16,) fp32
    out,  # (rows, columns)
    block_bits,  # log2 of a block's elements
    k,
    first_row,
    first_column,
    rows,
    columns,
    IN_WORDS: tl.constexpr,  # see triton_weight.py; then first_column and columns are multiples of PIECE
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    if IN_WORDS:
        k, columns, first_column = k // PIECE * PIECE, columns // PIECE * PIECE, first_column // PIECE * PIECE
    table, table8, offset = tl.load(values4 + tl.arange(0, 16)), table_of_8(values8), offset_of(absmax_offset)
    row, start = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS
    column = start + tl.arange(0, COLUMNS)
    w_row = (first_row + tl.minimum(row, rows - 1)).to(tl.int64) * k + first_column
    if IN_WORDS:
        left = columns - start
        w = tile_in_words(packed, table, absmax, absmax_scale, offset, table8, block_bits, w_row + start, left, COLUMNS)
    else:
        element = w_row[:, None] + tl.minimum(column, columns - 1)[None, :]
        w = tile_by_elements(packed, table, absmax, absmax_scale, offset, table8, block_bits, element)
    at = out + row[:, None].to(tl.int64) * columns + column[None, :]
    w = (w + 0.0).to(out.dtype.element_ty)  # -1 * 0 is a plain zero, as nf4_dequantize has it
    tl.store(at, w, mask=(row < rows)[:, None] & (column < columns)[None, :])
