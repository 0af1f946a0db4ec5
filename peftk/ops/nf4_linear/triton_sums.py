"""out[i] = partial[0][i] + partial[1][i] + …, in this order: the second stage of a split product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from peftk.ops import gpu
from peftk.ops.triton_words import EXACT

TILE = 1024  # sums a program: 8 a thread, so that 16-bit results leave by 16 bytes
WARPS = 4


@triton.jit(do_not_specialize=["split"])
def nf4_linear_sums(
    partial,  # (split, count) fp32
    out,  # (count,) fp32, bf16 or fp16
    count: tl.int64,
    split,
    TILE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    for run in range(split):
        total += tl.load(partial + run * count + i, mask=i < count, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < count)


def add_runs(partial: torch.Tensor, out: torch.Tensor) -> None:
    """partial (split, m, n) fp32 -> out (m, n)."""
    grid = (triton.cdiv(out.numel(), TILE),)
    gpu.triton().launch(nf4_linear_sums, grid, partial, out, out.numel(), partial.shape[0], TILE=TILE, num_warps=WARPS, **EXACT)
