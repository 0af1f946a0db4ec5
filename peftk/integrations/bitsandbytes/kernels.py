"""bitsandbytes' ops on a CPU by peftk's kernels. Signatures are those of ``torch.ops.bitsandbytes``, with its defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from peftk.format.code4 import CODES4, values4
from peftk.integrations.bitsandbytes.regime import dense_dtypes, is_dense
from peftk.integrations.bitsandbytes.weights import (
    Constants,
    as_bytes,
    constants,
    is_dynamic8,
    plain_constants,
)

Tensor = torch.Tensor


# ---- 4 bits -----------------------------------------------------------------------------------------------------------------


def quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """-> (bytes, 1) in ``quant_storage``, absmax"""
    packed, absmax = torch.ops.peftk.nf4_quantize(A, blocksize, quant_type)
    return packed.view(quant_storage)[:, None], absmax


def dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return torch.ops.peftk.nf4_dequantize(as_bytes(A), *plain_constants(absmax), shape, blocksize, quant_type, dtype)


def dequantize_4bit_out(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype, out: Tensor
) -> None:
    arguments = as_bytes(A), *plain_constants(absmax), shape, blocksize, quant_type
    if out.is_contiguous() and out.dtype == dtype and tuple(out.shape) == tuple(shape):
        torch.ops.peftk.nf4_dequantize_(*arguments, out)
    else:
        out.copy_(torch.ops.peftk.nf4_dequantize(*arguments, dtype))


def gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """A W^T + bias; where absmax_8bit is given, absmax is that of its blocks of 256"""
    nested = absmax_8bit is not None
    parts = constants(absmax_8bit, absmax, absmax_code, absmax_offset) if nested else plain_constants(absmax)
    return linear(A, as_bytes(B), parts, shapeB, blocksize, quant_type, bias)


def gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """A W^T, W's code told by its 16 values"""
    if absmax.dim() == 2:
        B, absmax = repacked_before(B, absmax)
    return linear(A, as_bytes(B), plain_constants(absmax), shapeB, blocksize, quant_type_of(code), None)


def gemv_4bit_out(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int, out: Tensor) -> None:
    out.copy_(gemv_4bit(A, B, shapeB, absmax, code, blocksize))


def linear(
    x: Tensor,
    packed: Tensor,
    parts: Constants,
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
    bias: Tensor | None,
) -> Tensor:
    """x W^T + bias in x.dtype"""
    if is_dense(x, dense_dtypes()):
        w = torch.ops.peftk.nf4_dequantize(packed, *parts, shape, block_size, quant_type, x.dtype)
        return torch.nn.functional.linear(x, w, bias)
    return torch.ops.peftk.nf4_linear(x, packed, *parts, shape[0], block_size, quant_type, bias)


def quant_type_of(code: Tensor) -> str:
    """ValueError where the 16 values are no code of ours."""
    for quant_type in CODES4:
        if code.shape == (16,) and torch.allclose(code.float(), values4(quant_type, code.device), atol=1e-4):
            return quant_type
    raise ValueError(f"code: expected the 16 values of {' or '.join(CODES4)}, got {code.tolist()}")


def repacked_before(B: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """What bitsandbytes repacked for its own kernel before peftk took over, as it was but for absmax's rounding to bf16."""
    from types import SimpleNamespace

    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = SimpleNamespace(
        packing_format_for_cpu=True, original_qshape=(-1, 1), original_nested=False, original_dtype=absmax.dtype
    )
    return _convert_weight_packed_for_cpu_inverse(B, state)[0], absmax.T.reshape(-1)


# ---- 8 bits -----------------------------------------------------------------------------------------------------------------


def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    for signed in (True, False):
        if is_dynamic8(code, signed):
            return torch.ops.peftk.blockwise8_quantize(A, blocksize, signed)
    return quantize_to(A, code, blocksize)


def dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    for signed in (True, False):
        if is_dynamic8(code, signed):
            return torch.ops.peftk.blockwise8_dequantize(A, absmax.float(), blocksize, signed, dtype)
    scale = absmax.float().repeat_interleave(blocksize)[: A.numel()]
    return (code.float()[A.reshape(-1).int()] * scale).to(dtype).reshape(A.shape)


def dequantize_blockwise_out(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor) -> None:
    out.copy_(dequantize_blockwise(A, absmax, code, blocksize, dtype))


def quantize_to(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """To the nearest of any values; of two as near, the lower one."""
    count = A.numel()
    blocks = torch.nn.functional.pad(A.reshape(-1).float(), (0, -count % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(1) if count else blocks.new_empty(0)
    scaled = torch.where(absmax == 0, 0.0, 1 / absmax)[:, None] * blocks
    values, order = code.float().sort()
    nearest = torch.bucketize(scaled, (values[:-1] + values[1:]) / 2, out_int32=True)
    return order.to(torch.uint8)[nearest].view(-1)[:count].reshape(A.shape), absmax


KERNELS: dict[str, Callable[..., Any]] = {
    "quantize_4bit": quantize_4bit,
    "dequantize_4bit": dequantize_4bit,
    "dequantize_4bit.out": dequantize_4bit_out,
    "gemm_4bit": gemm_4bit,
    "gemv_4bit": gemv_4bit,
    "gemv_4bit.out": gemv_4bit_out,
    "quantize_blockwise": quantize_blockwise,
    "dequantize_blockwise": dequantize_blockwise,
    "dequantize_blockwise.out": dequantize_blockwise_out,
}


def is_defined(op: str) -> bool:
    """Whether the installed bitsandbytes has the op, or the overload."""
    name, _, overload = op.partition(".")
    packet = getattr(torch.ops.bitsandbytes, name, None)
    return packet is not None and (overload or "default") in packet.overloads()
