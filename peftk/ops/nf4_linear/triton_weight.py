"""Words for Triton kernels that read a 4-bit W: a tile of it, decoded in registers to value * scale in fp32, exactly as W is
defined. Two ways, by a constexpr:

in words: k and blocks are multiples of 64 (PIECE), so that a piece of a row has one scale and its codes are whole 32-bit words.
by elements: every other shape and block size; each element finds its byte and its scale.

The 16 values are looked up in shared memory (tl.gather): they lie in 16 banks, so a warp's look-ups never conflict. A table of
all 256 pairs took 8.8 instructions a weight instead of 10.3 (sm_80, tile of 128), but random 8-byte look-ups conflict: 2045
passes through the banks a tile of 8192 weights instead of 1509; 1268 instead of 727 with 16 rows of x (counted, not timed).
"""

from __future__ import annotations

import triton
import triton.language as tl

from peftk.format import dynamic8

PIECE = tl.constexpr(64)  # elements: gpu_product.BLOCK
NESTED_BLOCK = tl.constexpr(dynamic8.NESTED_BLOCK)


@triton.jit
def table_of_8(values8):
    """The 256 values of double quantised constants; None where there are none."""
    table = None
    if values8 is not None:
        table = tl.load(values8 + tl.arange(0, 256))
    return table


@triton.jit
def offset_of(absmax_offset):
    """The offset of double quantised constants, None where there are none."""
    offset = None
    if absmax_offset is not None:
        offset = tl.load(absmax_offset)
    return offset


@triton.jit
def scale_of(absmax, absmax_scale, offset, table8, block, inside=None):
    """The constants of these blocks, fp32; any number where they aren't ``inside``. A gather: Triton follows a tl.load's address
    back to the 8-bit code, and lays out the operands of tl.dot for 8-bit ones (20.7 instructions a weight instead of 10.3)."""
    scale = tl.load(absmax + block, mask=inside)
    if absmax_scale is not None:
        code = scale.to(tl.int32)
        value = tl.reshape(tl.gather(table8, tl.reshape(code, (code.numel,)), 0), code.shape)
        scale = value * tl.load(absmax_scale + block // NESTED_BLOCK, mask=inside) + offset
    return scale


@triton.jit
def tile_in_words(packed, table, absmax, absmax_scale, offset, table8, block_bits, first, width, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) of W, fp32, whose rows start at the flat indices ``first`` (ROWS,), multiples of PIECE, and have ``width``
    elements left: any number beyond those, unless COLUMNS is PIECE and it doesn't happen."""
    ROWS: tl.constexpr = first.shape[0]
    number = tl.arange(0, COLUMNS // 8)[None, :]
    words = packed.to(tl.pointer_type(tl.uint32), bitcast=True) + (first // 8)[:, None] + number
    if COLUMNS <= PIECE:
        word, block = tl.load(words), first >> block_bits
        scale = scale_of(absmax, absmax_scale, offset, table8, block)[:, None]
    else:
        word = tl.load(words, mask=number < width // 8)
        column = PIECE * tl.arange(0, COLUMNS // PIECE)[None, :]
        block = (first[:, None] + column) >> block_bits
        scale = scale_of(absmax, absmax_scale, offset, table8, block, column < width)[:, :, None]
    half = tl.reshape(tl.join(word, word >> 16), (ROWS, COLUMNS // 4))  # little endian: the first element is the high nibble of
    byte = tl.reshape(tl.join(half, half >> 8), (ROWS, COLUMNS // 2))  # the lowest byte
    code = tl.reshape(tl.join(byte >> 4, byte) & 15, (ROWS * COLUMNS,)).to(tl.int32)
    value = tl.gather(table, code, 0)
    if COLUMNS <= PIECE:
        return tl.reshape(value, (ROWS, COLUMNS)) * scale
    else:
        return tl.reshape(tl.reshape(value, (ROWS, COLUMNS // PIECE, PIECE)) * scale, (ROWS, COLUMNS))


@triton.jit
def tile_by_elements(packed, table, absmax, absmax_scale, offset, table8, block_bits, element):
    """W at these flat indices."""
    byte = tl.load(packed + element // 2).to(tl.int32)
    code = (byte >> (4 * (~element & 1)).to(tl.int32)) & 15
    value = tl.reshape(tl.gather(table, tl.reshape(code, (code.numel,)), 0), code.shape)
    return value * scale_of(absmax, absmax_scale, offset, table8, element >> block_bits)


@triton.jit
def add_product(total, left, right, DEPTH: tl.constexpr):
    """total + left (ROWS, DEPTH) right (DEPTH, COLUMNS), a round of a sum. In fp32 the round is summed by itself: that ended 0.5
    times as far from fp64 as torch's product, one chain through all rounds 1.2 to 2 times. max_num_imprecise_acc keeps Triton
    from making it that chain again, and says nothing else for fp32."""
    if left.dtype == tl.float32:
        total += tl.dot(left, right, input_precision="ieee", max_num_imprecise_acc=DEPTH)
    else:
        total = tl.dot(left, right, total)
    return total


@triton.jit
def low_rank(
    left, right, right_stride, right_step, rows, columns, r, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr
):
    """(ROWS, COLUMNS) of left (m, r) right^T, fp32; element (column, i) of right lies at column * right_stride + i *
    right_step."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, r, STEP, num_stages=1):
        i = first + tl.arange(0, STEP)
        a = tl.load(left + rows[:, None] * r + i[None, :], mask=(i < r)[None, :], other=0.0)
        b = tl.load(right + columns[None, :] * right_stride + i[:, None] * right_step, mask=(i < r)[:, None], other=0.0)
        total = add_product(total, a, b, STEP)
    return total
