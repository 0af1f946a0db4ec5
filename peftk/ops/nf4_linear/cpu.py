"""W is decoded a panel of rows at a time into the second-level cache (csrc/ops/nf4_dequantize/cpu.cpp), and each panel is
multiplied before the next one is decoded: the largest temporary is PANEL_BYTES, whatever the size of W."""

from collections.abc import Iterator

import torch

from peftk.format.code4 import code4
from peftk.native import NATIVE_DTYPE, address, native
from peftk.ops.dispatch import Implementation, reasons_against_cpu, reasons_against_dtype

PANEL_BYTES = 1 << 20  # half of it is too short for torch's matmul, twice as much falls out of a 1 MB second-level cache


def reasons_against(x, packed, absmax, absmax_scale, absmax_offset, size, block_size, quant_type, bias=None) -> list[str]:
    return reasons_against_cpu(x, packed, absmax, bias) + reasons_against_dtype("x", x.dtype)


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


def run(x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias) -> torch.Tensor:
    k = x.shape[-1]
    rows = x.reshape(-1, k).to(compute_dtype(x))
    y = torch.empty(rows.shape[0], n, dtype=rows.dtype)
    for first, last, w in panels((packed, absmax, absmax_scale, absmax_offset), n, k, block_size, quant_type, rows.dtype):
        part = y[:, first:last]
        if bias is None:
            part.copy_(rows @ w.T)
        else:
            part.copy_(torch.addmm(bias[first:last].to(rows.dtype), rows, w.T))
    return y.to(x.dtype).view(*x.shape[:-1], n)


def run_dx(dy, packed, absmax, absmax_scale, absmax_offset, k, block_size, quant_type) -> torch.Tensor:
    n = dy.shape[-1]
    rows = dy.reshape(-1, n).to(compute_dtype(dy))
    dx = torch.zeros(rows.shape[0], k, dtype=torch.float32)
    for first, last, w in panels((packed, absmax, absmax_scale, absmax_offset), n, k, block_size, quant_type, rows.dtype):
        dx += rows[:, first:last] @ w
    return dx.to(dy.dtype).view(*dy.shape[:-1], k)


FORWARD = Implementation("cpu", run, reasons_against)
DX = Implementation("cpu", run_dx, reasons_against)
