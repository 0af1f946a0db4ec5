"""x[i] = dtype(value8[codes[i]] * absmax[i // block_size] + 0).

One program decodes TILE elements, a thread of it 8 at a time that share a block. Values and scales are looked up in shared memory
(tl.gather).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from peftk.format.dynamic8 import values8
from peftk.ops import gpu
from peftk.ops.triton_words import EXACT, blocks_touched

TILE = 2048  # elements
WARPS = 4
GROUP = tl.constexpr(8)  # neighbours that look their scale up once


@triton.jit
def _tile(codes, table, scale, out, first, lead, left, BLOCK_SIZE, TILE, GROUP: tl.constexpr, RAGGED: tl.constexpr):
    """Without masks, unless RAGGED, loads and stores are 16 bytes wide whatever the count is."""
    i = tl.arange(0, TILE)
    inside = i < left if RAGGED else None
    code = tl.load(codes + first + i, mask=inside, other=0 if RAGGED else None).to(tl.int32)
    value = tl.reshape(tl.gather(table, code, 0), (TILE // GROUP, GROUP))
    group = tl.arange(0, TILE // GROUP)
    x = value * tl.gather(scale, (lead + GROUP * group) // BLOCK_SIZE, 0)[:, None] + 0.0
    x = tl.reshape(x, (TILE,)).to(out.dtype.element_ty)
    tl.store(out + first + i, x, mask=inside, cache_modifier=".cs")


@triton.jit(do_not_specialize=["count", "whole_tiles"])
def blockwise8_dequantize(
    codes,  # (count,) uint8
    absmax,  # (blocks,) fp32
    values8,  # (256,) fp32
    out,  # (count,) fp32, bf16 or fp16
    count: tl.int64,  # elements
    whole_tiles: tl.int64,  # programs below this one take no masks
    BLOCK_SIZE: tl.constexpr,  # elements
    TILE: tl.constexpr,  # elements a program
    BLOCKS: tl.constexpr,  # that a tile may touch
):
    tile = tl.program_id(0).to(tl.int64)
    first = tile * TILE
    first_block = first // BLOCK_SIZE
    lead = (first - first_block * BLOCK_SIZE).to(tl.int32)  # elements of the first block that lie before the tile
    block = first_block + tl.arange(0, BLOCKS)
    scale = tl.load(absmax + block, mask=block * BLOCK_SIZE < count, other=0.0)
    table = tl.load(values8 + tl.arange(0, 256))
    left = tl.minimum(count - first, TILE).to(tl.int32)
    if tile < whole_tiles:
        _tile(codes, table, scale, out, first, lead, left, BLOCK_SIZE, TILE, GROUP, False)
    else:
        _tile(codes, table, scale, out, first, lead, left, BLOCK_SIZE, TILE, 1, True)


def run(codes: torch.Tensor, absmax: torch.Tensor, block_size: int, signed: bool, dtype: torch.dtype) -> torch.Tensor:
    codes, absmax, count = codes.contiguous(), absmax.contiguous(), codes.numel()
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if count:
        gpu.triton().launch(
            blockwise8_dequantize, (triton.cdiv(count, TILE),), codes, absmax, values8(signed, codes.device), out, count,
            count // TILE if block_size % GROUP.value == 0 else 0, BLOCK_SIZE=block_size, TILE=TILE,
            BLOCKS=blocks_touched(TILE, block_size), num_warps=WARPS, **EXACT,
        )  # fmt: skip
    return out
