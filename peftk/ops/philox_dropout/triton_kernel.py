"""out[i] = x[i] * (keep_scale where element i is kept, else 0). A thread makes one counter of Philox for four elements."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from peftk.ops import gpu
from peftk.ops.triton_words import EXACT, keeps_fours

TILE = 1024  # elements
WARPS = 4  # 8 elements a thread: one 16-byte access of 16-bit ones, two of fp32


@triton.jit
def _tile(x, out, first, left, drop_below, keep_scale, seed, TILE: tl.constexpr, RAGGED: tl.constexpr):
    """Without masks, unless RAGGED, accesses are 16 bytes wide whatever the count is."""
    i = tl.arange(0, TILE)
    inside = i < left if RAGGED else None
    counter = first // 4 + tl.arange(0, TILE // 4)
    keep = tl.reshape(keeps_fours(counter[None, :], drop_below, seed), (TILE,))
    y = tl.load(x + first + i, mask=inside).to(tl.float32) * tl.where(keep, keep_scale, 0.0)
    tl.store(out + first + i, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "drop_below", "keep_scale", "seed"])
def philox_dropout(
    x,  # (count,) fp32, bf16 or fp16
    out,  # (count,) the same
    count: tl.int64,  # elements
    drop_below: tl.uint32,  # p * 2^32
    keep_scale: tl.float32,  # 1 / (1 - p)
    seed: tl.int64,
    TILE: tl.constexpr,  # elements a program
):
    first = tl.program_id(0).to(tl.int64) * TILE
    left = tl.minimum(count - first, TILE).to(tl.int32)
    if left == TILE:
        _tile(x, out, first, left, drop_below, keep_scale, seed, TILE, False)
    else:
        _tile(x, out, first, left, drop_below, keep_scale, seed, TILE, True)


def run(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    x = x.contiguous()
    out, count = torch.empty_like(x), x.numel()
    if count:
        gpu.triton().launch(
            philox_dropout, (triton.cdiv(count, TILE),), x, out, count, int(p * 2**32), 1 / (1 - p), seed, TILE=TILE,
            num_warps=WARPS, **EXACT,
        )  # fmt: skip
    return out
