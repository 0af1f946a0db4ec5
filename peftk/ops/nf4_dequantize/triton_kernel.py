"""w[i] = dtype(table[code[i]] * scale[i // block_size] + 0), double quantisation included, in one kernel.

packed: element 2i in the high nibble of byte i. One program decodes TILE elements; a thread of it 8 at a time, from one 32-bit
word of codes to one 16-byte store of 16-bit elements. Scales and the 16 values are looked up in shared memory (tl.gather): 16
words lie in 16 banks, so a warp's look-ups of values never conflict. A table of all 256 pairs halves them (5.5 instructions a
weight on sm_80 instead of 7.0), but needs 2.3 times the passes through the banks: random 8-byte accesses meet in them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from peftk.format.code4 import values4
from peftk.format.dynamic8 import NESTED_BLOCK, values8
from peftk.ops import gpu
from peftk.ops.triton_words import EXACT, blocks_touched

# On sm_80 (bf16, blocks of 64) a whole tile of 4096 elements by 4 warps takes 44 registers and 8.1 instructions a weight, one of
# 8192 by 4 takes 80 and 7.0: counted in the cubin, not timed.
TILE = 4096  # elements
WARPS = 4
WORD = tl.constexpr(8)  # codes in 32 bits
STEP = tl.constexpr(512)  # elements of a ragged tile at a time


@triton.jit
def _scales(absmax, absmax_scale, absmax_offset, values8, block, blocks, NESTED_BLOCK: tl.constexpr):
    """The constants of these blocks, fp32; two roundings where they are double quantised."""
    inside = block < blocks
    scale = tl.load(absmax + block, mask=inside, other=0)
    if absmax_scale is not None:
        value = tl.load(values8 + scale.to(tl.int32))
        scale = value * tl.load(absmax_scale + block // NESTED_BLOCK, mask=inside, other=0.0) + tl.load(absmax_offset)
    return scale


@triton.jit
def _whole_tile(packed, table, scale, out, first, lead, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """No masks, so that loads and stores are 16 bytes wide whatever the count is."""
    word = tl.arange(0, TILE // WORD)
    eight = tl.load(packed.to(tl.pointer_type(tl.uint32), bitcast=True) + first // WORD + word)
    shift = 4 * (tl.arange(0, WORD) ^ 1)  # little endian: the first element is the high nibble of the lowest byte
    code = tl.reshape((eight[:, None] >> shift[None, :]) & 15, (TILE,)).to(tl.int32)
    value = tl.reshape(tl.gather(table, code, 0), (TILE // WORD, WORD))
    w = value * tl.gather(scale, (lead + WORD * word) // BLOCK_SIZE, 0)[:, None] + 0.0
    w = tl.reshape(w, (TILE,)).to(out.dtype.element_ty)
    tl.store(out + first + tl.arange(0, TILE), w, cache_modifier=".cs")


@triton.jit
def _ragged_tile(packed, table, scale, out, first, lead, left, BLOCK_SIZE: tl.constexpr, STEP: tl.constexpr):
    """The last elements; every element where a word of codes isn't aligned or crosses a block. In steps, to save registers."""
    for start in range(0, left, STEP):
        i = start + tl.arange(0, STEP)
        inside = i < left
        byte = tl.load(packed + first // 2 + i // 2, mask=inside, other=0).to(tl.int32)
        value = tl.gather(table, (byte >> (4 * (~i & 1))) & 15, 0)
        w = value * tl.gather(scale, (lead + i) // BLOCK_SIZE, 0) + 0.0
        tl.store(out + first + i, w.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "whole_tiles"])
def nf4_dequantize(
    packed,  # (ceil(count / 2),) uint8
    absmax,  # (blocks,) fp32, or uint8 codes where double quantised
    absmax_scale,  # (ceil(blocks / NESTED_BLOCK),) fp32 or None
    absmax_offset,  # () fp32 or None
    values8,  # (256,) fp32 or None
    values4,  # (16,) fp32
    out,  # (count,) fp32, bf16 or fp16
    count: tl.int64,  # elements
    whole_tiles: tl.int64,  # programs below this one take no masks
    BLOCK_SIZE: tl.constexpr,  # elements
    NESTED_BLOCK: tl.constexpr,  # blocks
    TILE: tl.constexpr,  # elements a program
    BLOCKS: tl.constexpr,  # that a tile may touch
):
    tile = tl.program_id(0).to(tl.int64)
    first = tile * TILE
    first_block = first // BLOCK_SIZE
    lead = (first - first_block * BLOCK_SIZE).to(tl.int32)  # elements of the first block that lie before the tile
    blocks = (count + BLOCK_SIZE - 1) // BLOCK_SIZE
    block = first_block + tl.arange(0, BLOCKS)
    scale = _scales(absmax, absmax_scale, absmax_offset, values8, block, blocks, NESTED_BLOCK)
    table = tl.load(values4 + tl.arange(0, 16))
    if tile < whole_tiles:
        _whole_tile(packed, table, scale, out, first, lead, BLOCK_SIZE, TILE)
    else:
        left = tl.minimum(count - first, TILE).to(tl.int32)
        _ragged_tile(packed, table, scale, out, first, lead, left, BLOCK_SIZE, STEP)


def run(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    absmax_scale: torch.Tensor | None,
    absmax_offset: torch.Tensor | None,
    block_size: int,
    quant_type: str,
    out: torch.Tensor,
) -> None:
    packed, absmax, count = packed.contiguous(), absmax.contiguous(), out.numel()
    if not count:
        return
    in_words = packed.data_ptr() % 4 == 0 and block_size % WORD.value == 0
    gpu.triton().launch(
        nf4_dequantize, (triton.cdiv(count, TILE),), packed, absmax, absmax_scale, absmax_offset,
        None if absmax_scale is None else values8(True, out.device), values4(quant_type, out.device), out, count,
        count // TILE if in_words else 0, BLOCK_SIZE=block_size, NESTED_BLOCK=NESTED_BLOCK, TILE=TILE,
        BLOCKS=blocks_touched(TILE, block_size), num_warps=WARPS, **EXACT,
    )  # fmt: skip
