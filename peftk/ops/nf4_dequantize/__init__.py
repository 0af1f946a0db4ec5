"""nf4_dequantize: 4-bit codes and their constants -> W (Dettmers et al. 2023, QLoRA, equations 5 and 6).

w[i] = dtype(table[code[i]] * scale[i // block_size] + 0) in fp32, so that a zero is +0;
scale = absmax, or where the absmax are double quantised: scale = value8[absmax] * absmax_scale[b // 256], then + absmax_offset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from peftk.format.code4 import code4
from peftk.format.dynamic8 import NESTED_BLOCK
from peftk.ops import dispatch, gpu, library
from peftk.ops.nf4_dequantize import cpu, cuda, reference


def _against_triton(packed, absmax, absmax_scale, absmax_offset, block_size, quant_type, out) -> list[str]:
    reasons = gpu.triton().reasons_against(packed, absmax, absmax_scale, absmax_offset, out)
    return reasons + dispatch.reasons_against_dtype("out", out.dtype)


TABLE = (
    cpu.IMPLEMENTATION,
    cuda.IMPLEMENTATION,
    gpu.triton_implementation("nf4_dequantize", _against_triton),
    reference.IMPLEMENTATION,
)


def nf4_dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    absmax_scale: torch.Tensor | None,
    absmax_offset: torch.Tensor | None,
    shape: Sequence[int],
    block_size: int = 64,
    quant_type: str = "nf4",
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """packed ceil(numel / 2) bytes, absmax (blocks,) fp32, or uint8 with absmax_scale (ceil(blocks / 256),) fp32 and
    absmax_offset () fp32 -> (shape) dtype, written to ``out`` if given. TypeError or ValueError names what doesn't fit."""
    if any(size < 0 for size in shape):
        raise ValueError(f"shape: expected sizes from 0 on, got {tuple(shape)}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
    check_constants(packed, absmax, absmax_scale, absmax_offset, math.prod(shape), block_size, quant_type)
    arguments = (packed, absmax, absmax_scale, absmax_offset, shape, block_size, quant_type)
    if out is None:
        return torch.ops.peftk.nf4_dequantize(*arguments, dtype)
    if tuple(out.shape) != tuple(shape) or not out.is_contiguous() or out.device != packed.device:
        raise ValueError(
            f"out: expected a contiguous tensor of shape {tuple(shape)} on {packed.device}, got {tuple(out.shape)} with "
            f"strides {out.stride()} on {out.device}"
        )
    torch.ops.peftk.nf4_dequantize_(*arguments, out)
    return out


def check_constants(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    absmax_scale: torch.Tensor | None,
    absmax_offset: torch.Tensor | None,
    count: int,
    block_size: int,
    quant_type: str,
    at: str = "",
) -> None:
    """Hold the parts of a quantised weight of ``count`` elements against each other. ``at``: what stands before their names."""
    code4(quant_type)
    if packed.dtype != torch.uint8:
        raise TypeError(f"{at}packed: expected uint8, got {packed.dtype}")
    if packed.numel() != (count + 1) // 2:
        raise ValueError(f"{at}packed: expected {(count + 1) // 2} bytes for {count} elements, got {packed.numel()}")
    for name, part in (("packed", packed), ("absmax", absmax), ("absmax_scale", absmax_scale)):
        if part is not None and not part.is_contiguous():
            raise ValueError(f"{at}{name}: expected a contiguous tensor, got strides {part.stride()}")
    if block_size < 1:
        raise ValueError(f"{at}block_size: expected at least 1, got {block_size}")
    blocks = -(-count // block_size)
    nested = absmax_scale is not None
    if nested != (absmax_offset is not None):
        there = "absmax_scale" if nested else "absmax_offset"
        raise ValueError(f"{at}absmax_scale, absmax_offset: expected both or neither, got {there} and None")
    for name, part in (("absmax", absmax), ("absmax_scale", absmax_scale), ("absmax_offset", absmax_offset)):
        if part is not None and part.device != packed.device:
            raise ValueError(f"{at}{name}: expected on packed's {packed.device}, got {part.device}")
    if nested and (absmax_offset.dtype != torch.float32 or absmax_offset.numel() != 1):
        raise ValueError(f"{at}absmax_offset: expected one fp32 value, got {absmax_offset.numel()} {absmax_offset.dtype}")
    wanted = torch.uint8 if nested else torch.float32
    if absmax.dtype != wanted:
        raise TypeError(f"{at}absmax: expected {wanted} {'with' if nested else 'without'} absmax_scale, got {absmax.dtype}")
    if absmax.numel() != blocks:
        raise ValueError(
            f"{at}absmax: expected {blocks} values for {count} elements in blocks of {block_size}, got {absmax.numel()}"
        )
    if nested and (absmax_scale.dtype != torch.float32 or absmax_scale.numel() != -(-blocks // NESTED_BLOCK)):
        wanted_scales = f"{-(-blocks // NESTED_BLOCK)} fp32 values"
        raise ValueError(f"{at}absmax_scale: expected {wanted_scales}, got {absmax_scale.numel()} {absmax_scale.dtype}")


def _run(packed, absmax, absmax_scale, absmax_offset, shape, block_size, quant_type, dtype):
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    _run_out(packed, absmax, absmax_scale, absmax_offset, shape, block_size, quant_type, out)
    return out


def _run_out(packed, absmax, absmax_scale, absmax_offset, shape, block_size, quant_type, out):
    arguments = (packed, absmax, absmax_scale, absmax_offset, block_size, quant_type, out)
    dispatch.select("nf4_dequantize", TABLE, *arguments)(*arguments)


def _fake(packed, absmax, absmax_scale, absmax_offset, shape, block_size, quant_type, dtype):
    return packed.new_empty(shape, dtype=dtype)


_PARTS = (
    "Tensor packed, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset, SymInt[] shape, int block_size, str quant_type"
)
library.define(f"nf4_dequantize({_PARTS}, ScalarType dtype) -> Tensor", _run, _fake)
library.define(f"nf4_dequantize_({_PARTS}, Tensor(a!) out) -> ()", _run_out, lambda *_: None)
