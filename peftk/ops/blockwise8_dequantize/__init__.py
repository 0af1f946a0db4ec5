"""blockwise8_dequantize: dynamic 8-bit codes -> x[i] = dtype(value8[codes[i]] * absmax[i // block_size])."""

from __future__ import annotations

import torch

from peftk.ops import dispatch, gpu, library
from peftk.ops.blockwise8_dequantize import cpu, cuda, reference


def _against_triton(codes: torch.Tensor, absmax: torch.Tensor, block_size: int, signed: bool, dtype: torch.dtype) -> list[str]:
    return gpu.triton().reasons_against(codes, absmax) + dispatch.reasons_against_dtype("dtype", dtype)


TABLE = (
    cpu.IMPLEMENTATION,
    cuda.IMPLEMENTATION,
    gpu.triton_implementation("blockwise8_dequantize", _against_triton),
    reference.IMPLEMENTATION,
)


def blockwise8_dequantize(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    block_size: int = 256,
    dtype: torch.dtype = torch.float32,
    signed: bool = True,
) -> torch.Tensor:
    """codes (any shape) uint8, absmax (ceil(numel / block_size),) fp32 -> (codes.shape) dtype. TypeError or ValueError names
    the argument that doesn't fit."""
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes: expected uint8, got {codes.dtype}")
    if absmax.dtype != torch.float32:
        raise TypeError(f"absmax: expected fp32, got {absmax.dtype}")
    blocks = -(-codes.numel() // block_size) if block_size > 0 else 0
    if block_size < 1 or absmax.numel() != blocks:
        raise ValueError(
            f"absmax: expected {blocks} values for {codes.numel()} codes in blocks of {block_size}, got {absmax.numel()}"
        )
    return torch.ops.peftk.blockwise8_dequantize(codes, absmax, block_size, signed, dtype)


def _run(codes: torch.Tensor, absmax: torch.Tensor, block_size: int, signed: bool, dtype: torch.dtype) -> torch.Tensor:
    arguments = (codes, absmax, block_size, signed, dtype)
    return dispatch.select("blockwise8_dequantize", TABLE, *arguments)(*arguments)


def _fake(codes: torch.Tensor, absmax: torch.Tensor, block_size: int, signed: bool, dtype: torch.dtype) -> torch.Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


library.define(
    "blockwise8_dequantize(Tensor codes, Tensor absmax, int block_size, bool signed, ScalarType dtype) -> Tensor",
    _run,
    _fake,
)
