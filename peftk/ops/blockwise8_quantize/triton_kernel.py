"""codes[i] = the value of the dynamic code nearest to x[i] * (1 / absmax[i // block_size]), absmax[b] = max |x| over block b.

One program quantises ROWS blocks as (ROWS, COLUMNS), COLUMNS = block_size rounded up to a power of two, so that a block's maximum
is a reduction over one axis. The code is 8 steps down a binary tree of thresholds in shared memory.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from peftk.format.dynamic8 import thresholds8
from peftk.ops import gpu
from peftk.ops.triton_words import EXACT, count_below, in_heap_order, row_absmax, unit_rows

TILE = 2048  # elements a program, or one block where that is larger
ELEMENTS_A_WARP = 512  # 16 a thread: 72 registers on sm_80


@triton.jit
def _tile(x, heap, codes, absmax, first_block, left, BLOCK_SIZE, ROWS, COLUMNS, RAGGED: tl.constexpr):
    """Without masks, unless RAGGED, loads and stores are 16 bytes wide whatever the count is."""
    first = first_block * BLOCK_SIZE
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    i = row[:, None] * BLOCK_SIZE + column[None, :]
    inside = (column < BLOCK_SIZE)[None, :] & (i < left) if RAGGED else None
    rows = tl.load(x + first + i, mask=inside, other=0.0 if RAGGED else None).to(tl.float32)
    biggest = row_absmax(rows)
    unit = tl.reshape(unit_rows(rows, biggest), (ROWS * COLUMNS,))
    code = tl.reshape(count_below(unit, tl.load(heap + tl.arange(0, 256)), 8), (ROWS, COLUMNS))
    tl.store(codes + first + i, code.to(tl.uint8), mask=inside)
    tl.store(absmax + first_block + row, biggest, mask=row * BLOCK_SIZE < left if RAGGED else None)


@triton.jit(do_not_specialize=["count"])
def blockwise8_quantize(
    x,  # (count,) fp32, bf16 or fp16
    heap,  # (256,) fp32, the 255 thresholds in heap order
    codes,  # (count,) uint8
    absmax,  # (ceil(count / BLOCK_SIZE),) fp32
    count: tl.int64,  # elements
    BLOCK_SIZE: tl.constexpr,  # elements
    ROWS: tl.constexpr,  # blocks a program
    COLUMNS: tl.constexpr,  # BLOCK_SIZE rounded up to a power of two
):
    first_block = tl.program_id(0).to(tl.int64) * ROWS
    left = tl.minimum(count - first_block * BLOCK_SIZE, ROWS * BLOCK_SIZE).to(tl.int32)
    if left == ROWS * COLUMNS:
        _tile(x, heap, codes, absmax, first_block, left, BLOCK_SIZE, ROWS, COLUMNS, False)
    else:
        _tile(x, heap, codes, absmax, first_block, left, BLOCK_SIZE, ROWS, COLUMNS, True)


@cache
def _heap(signed: bool, device: torch.device) -> torch.Tensor:
    return torch.tensor(in_heap_order(thresholds8(signed).tolist()), dtype=torch.float32, device=device)


def run(x: torch.Tensor, block_size: int, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x, count = x.contiguous(), x.numel()
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=x.device)
    if count:
        columns = triton.next_power_of_2(block_size)
        tile = max(TILE, columns)
        gpu.triton().launch(
            blockwise8_quantize, (triton.cdiv(absmax.numel(), tile // columns),), x, _heap(signed, x.device), codes, absmax,
            count, BLOCK_SIZE=block_size, ROWS=tile // columns, COLUMNS=columns, num_warps=tile // ELEMENTS_A_WARP, **EXACT,
        )  # fmt: skip
    return codes, absmax
