"""blockwise8_quantize: x -> dynamic 8-bit codes (Dettmers et al. 2022, section 2.1).

codes[i] = the value of the dynamic code nearest to x[i] * (1 / absmax[i // block_size]) in fp32, the lower one on a tie;
absmax[b] = max |x| over block b of the flat tensor; a block of zeros gets the code of 0.
"""

from __future__ import annotations

import torch

from peftk.ops import dispatch, gpu, library
from peftk.ops.blockwise8_quantize import cpu, cuda, reference

LARGEST_TRITON_BLOCK = 4096  # elements: a program holds whole blocks in its registers


def _against_triton(x: torch.Tensor, block_size: int, signed: bool) -> list[str]:
    reasons = gpu.triton().reasons_against(x) + dispatch.reasons_against_dtype("x", x.dtype)
    fits = block_size <= LARGEST_TRITON_BLOCK
    return reasons + ([] if fits else [f"block_size is {block_size}, the kernel takes up to {LARGEST_TRITON_BLOCK}"])


TABLE = (
    cpu.IMPLEMENTATION,
    cuda.IMPLEMENTATION,
    gpu.triton_implementation("blockwise8_quantize", _against_triton),
    reference.IMPLEMENTATION,
)


def blockwise8_quantize(x: torch.Tensor, block_size: int = 256, signed: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """x (any shape) fp32|bf16|fp16 -> codes (x.shape) uint8, absmax (ceil(numel / block_size),) fp32. ValueError for a bad
    block_size, TypeError for another dtype."""
    if block_size < 1:
        raise ValueError(f"block_size: expected a positive number, got {block_size}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    return torch.ops.peftk.blockwise8_quantize(x, block_size, signed)


def _run(x: torch.Tensor, block_size: int, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return dispatch.select("blockwise8_quantize", TABLE, x, block_size, signed)(x, block_size, signed)


def _fake(x: torch.Tensor, block_size: int, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = (x.numel() + block_size - 1) // block_size
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(blocks, dtype=torch.float32)


library.define("blockwise8_quantize(Tensor x, int block_size, bool signed) -> (Tensor, Tensor)", _run, _fake)
