"""code = code_of_rank[#{thresholds t : w * (1 / absmax) > t}], absmax[b] = max |w| over block b; element 2i in the high nibble.

One program quantises TILE elements as (blocks, BLOCK_SIZE), so that a block's maximum is a reduction over one axis. The rank is 4
steps down a binary tree of thresholds in shared memory: 28 instructions a weight on sm_80 (bf16, blocks of 64); 4 compares with
thresholds selected among constants took 32, a sum of 15 compares 57.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from peftk.format.code4 import code4
from peftk.ops import gpu
from peftk.ops.triton_words import EXACT, count_below, in_heap_order, row_absmax, unit_rows

TILE = 2048  # elements a program, or one block where that is larger
ELEMENTS_A_WARP = 512  # 16 a thread: 64 registers on sm_80


@triton.jit
def _tile(w, heap, code_of_rank, packed, absmax, first, left, BLOCK_SIZE, TILE, CODE_OF_ZERO, RAGGED: tl.constexpr):
    """Without masks, unless RAGGED, loads and stores are 16 bytes wide whatever the count is."""
    rows: tl.constexpr = TILE // BLOCK_SIZE
    i = tl.arange(0, TILE)
    inside = i < left if RAGGED else None
    x = tl.load(w + first + i, mask=inside, other=0.0 if RAGGED else None)
    x = tl.reshape(x.to(tl.float32), (rows, BLOCK_SIZE))
    biggest = row_absmax(x)
    code = count_below(tl.reshape(unit_rows(x, biggest), (TILE,)), tl.load(heap + tl.arange(0, 16)), 4)
    if code_of_rank is not None:
        code = tl.gather(tl.load(code_of_rank + tl.arange(0, 16)), code, 0)
    if RAGGED:
        code = tl.where(inside, code, CODE_OF_ZERO)
    high, low = tl.split(tl.reshape(code, (TILE // 2, 2)))
    byte = tl.arange(0, TILE // 2)
    tl.store(packed + first // 2 + byte, (high << 4 | low).to(tl.uint8), mask=2 * byte < left if RAGGED else None)
    row = tl.arange(0, rows)
    tl.store(absmax + first // BLOCK_SIZE + row, biggest, mask=row * BLOCK_SIZE < left if RAGGED else None)


@triton.jit(do_not_specialize=["count"])
def nf4_quantize(
    w,  # (count,) fp32, bf16 or fp16
    heap,  # (16,) fp32, the 15 thresholds in heap order
    code_of_rank,  # (16,) int32, or None where that is the rank itself
    packed,  # (ceil(count / 2),) uint8
    absmax,  # (ceil(count / BLOCK_SIZE),) fp32
    count: tl.int64,  # elements
    BLOCK_SIZE: tl.constexpr,  # elements, a power of two
    TILE: tl.constexpr,  # elements a program, whole blocks
    CODE_OF_ZERO: tl.constexpr,  # what pads an odd count
):
    first = tl.program_id(0).to(tl.int64) * TILE
    left = tl.minimum(count - first, TILE).to(tl.int32)
    if left == TILE:
        _tile(w, heap, code_of_rank, packed, absmax, first, left, BLOCK_SIZE, TILE, CODE_OF_ZERO, False)
    else:
        _tile(w, heap, code_of_rank, packed, absmax, first, left, BLOCK_SIZE, TILE, CODE_OF_ZERO, True)


@cache
def _tables(quant_type: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    code = code4(quant_type)
    heap = torch.tensor(in_heap_order(code.thresholds), dtype=torch.float32, device=device)
    if code.code_of_rank == tuple(range(16)):
        return heap, None
    return heap, torch.tensor(code.code_of_rank, dtype=torch.int32, device=device)


def run(w: torch.Tensor, block_size: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    w, count = w.contiguous(), w.numel()
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=w.device)
    if count:
        tile = max(TILE, block_size)
        gpu.triton().launch(
            nf4_quantize, (triton.cdiv(count, tile),), w, *_tables(quant_type, w.device), packed, absmax, count,
            BLOCK_SIZE=block_size, TILE=tile, CODE_OF_ZERO=code4(quant_type).code_of_zero, num_warps=tile // ELEMENTS_A_WARP,
            **EXACT,
        )  # fmt: skip
    return packed, absmax
