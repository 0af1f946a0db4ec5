"""The definition: W decoded whole, a product in fp32 (fp64 for fp64)."""

import torch

from peftk.ops import dispatch
from peftk.ops.dispatch import Implementation, no_reason


def dense(packed, absmax, absmax_scale, absmax_offset, n, k, block_size, quant_type, dtype) -> torch.Tensor:
    """W (n, k) in ``dtype``; its fp32 values are the definition."""
    with dispatch.use("reference"):
        w = torch.ops.peftk.nf4_dequantize(
            packed, absmax, absmax_scale, absmax_offset, (n, k), block_size, quant_type, torch.float32
        )
    return w.to(dtype)


def run(x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    w = dense(packed, absmax, absmax_scale, absmax_offset, n, x.shape[-1], block_size, quant_type, wide)
    y = x.to(wide) @ w.T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def run_dx(dy, packed, absmax, absmax_scale, absmax_offset, k, block_size, quant_type) -> torch.Tensor:
    wide = torch.promote_types(dy.dtype, torch.float32)
    w = dense(packed, absmax, absmax_scale, absmax_offset, dy.shape[-1], k, block_size, quant_type, wide)
    return (dy.to(wide) @ w).to(dy.dtype)


def run_many(x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias) -> list[torch.Tensor]:
    weights = zip(packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias, strict=True)
    return [run(x, *weight) for weight in weights]


def run_many_dx(dy, packed, absmax, absmax_scale, absmax_offset, k, block_size, quant_type) -> torch.Tensor:
    wide = torch.promote_types(dy[0].dtype, torch.float32)
    weights = zip(dy, packed, absmax, absmax_scale, absmax_offset, block_size, quant_type, strict=True)
    return sum(run_dx(one.to(wide), *parts, k, size, kind) for one, *parts, size, kind in weights).to(dy[0].dtype)


FORWARD = Implementation("reference", run, no_reason)
DX = Implementation("reference", run_dx, no_reason)
MANY = Implementation("reference", run_many, no_reason)
MANY_DX = Implementation("reference", run_many_dx, no_reason)
