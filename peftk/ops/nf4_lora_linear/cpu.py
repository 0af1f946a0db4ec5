"""The base product panel by panel as in nf4_linear; the branch through torch's own products, r columns wide."""

from collections.abc import Iterator

import torch

from peftk.format.code4 import code4
from peftk.native import NATIVE_DTYPE, address, native
from peftk.ops.dispatch import Implementation, reasons_against_cpu, reasons_against_dtype

PANEL_BYTES = 1 << 20  # half of it is too short for torch's matmul, twice as much falls out of a 1 MB second-level cache


def panels(weight: tuple, n: int, k: int, block_size: int, quant_type: str, dtype: torch.dtype) -> Iterator[tuple]:
    """(first row, last row, W[first:last] in ``dtype``), each in the same scratch memory."""
    packed, absmax, absmax_scale, absmax_offset = weight
    rows = min(n, max(1, PANEL_BYTES // max(k * dtype.itemsize, 1)))
    scratch = torch.empty(rows, k, dtype=dtype)
    fixed = (packed.data_ptr(), absmax.data_ptr(), address(absmax_scale), address(absmax_offset))
    for first in range(0, n, rows):
        last = min(first + rows, n)
        native().nf4_dequantize(
            *fixed, first * k, (last - first) * k, block_size, code4(quant_type).number, scratch.data_ptr(),
            NATIVE_DTYPE[dtype], torch.get_num_threads(),
        )  # fmt: skip
        yield first, last, scratch[: last - first]


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """fp16 is computed in fp32: torch's fp16 product on a CPU does not sum in fp32 everywhere."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def reasons_against(x, packed, absmax, absmax_scale, absmax_offset, A, B, *_) -> list[str]:
    return reasons_against_cpu(x, packed, absmax, A, B) + reasons_against_dtype("x", x.dtype)


def reasons_against_backward(dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, *_) -> list[str]:
    return reasons_against_cpu(dy, x, packed, A, B) + reasons_against_dtype("dy", dy.dtype)


def _dropped(z: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    return z if dropout == 0 else torch.ops.peftk.philox_dropout(z, dropout, seed)


def run(
    x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, scale, block_size, quant_type, dropout, seed
) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = B.shape[0], x.shape[-1]
    dtype = compute_dtype(x)
    rows = x.reshape(-1, k).to(dtype)
    dropped = _dropped(x if z is None else z, dropout, seed).reshape(-1, k).to(dtype)
    s = dropped @ A.to(dtype).T
    scaled_s, b = s * scale, B.to(dtype)
    y = torch.empty(rows.shape[0], n, dtype=dtype)
    weight = (packed, absmax, absmax_scale, absmax_offset)
    for first, last, w in panels(weight, n, k, block_size, quant_type, dtype):
        part = y[:, first:last]
        torch.mm(scaled_s, b[first:last].T, out=part)
        if bias is not None:
            part += bias[first:last].to(dtype)
        part.addmm_(rows, w.T)
    return y.to(x.dtype).view(*x.shape[:-1], n), s.to(x.dtype).view(*x.shape[:-1], A.shape[0])


def run_backward(
    dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, scale, block_size, quant_type, dropout, seed,
    need_dx, need_dz,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    n, k, source = dy.shape[-1], x.shape[-1], x if z is None else z
    dtype = compute_dtype(dy)
    rows = dy.reshape(-1, n).to(dtype)
    dropped = _dropped(source, dropout, seed).reshape(-1, k).to(dtype)
    t = (rows @ B.to(dtype)) * scale
    dz = None
    if need_dz or (need_dx and z is None):
        dz = _dropped((t @ A.to(dtype)).to(source.dtype).view(source.shape), dropout, seed)
    dx = dy.new_empty(0)
    if need_dx:
        total = torch.zeros(rows.shape[0], k) if z is not None else dz.reshape(-1, k).to(torch.float32, copy=True)
        weight = (packed, absmax, absmax_scale, absmax_offset)
        for first, last, w in panels(weight, n, k, block_size, quant_type, dtype):
            total += rows[:, first:last] @ w
        dx = total.to(x.dtype).view(x.shape)
    dA = (t.T @ dropped).to(A.dtype)
    dB = (rows.T @ s.reshape(-1, s.shape[-1]).to(dtype)).float().mul_(scale).to(B.dtype)
    return dx, dz if need_dz else dy.new_empty(0), dA, dB


FORWARD = Implementation("cpu", run, reasons_against)
BACKWARD = Implementation("cpu", run_backward, reasons_against_backward)
