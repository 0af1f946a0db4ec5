"""csrc/ops/nf4_linear/cpu.cpp"""

import torch

from peftk.format.code4 import code4
from peftk.native import NATIVE_DTYPE, address, native
from peftk.ops.dispatch import Implementation, reasons_against_cpu, reasons_against_dtype


def reasons_against(x, packed, absmax, absmax_scale, absmax_offset, size, block_size, quant_type, bias=None) -> list[str]:
    return reasons_against_cpu(x, packed, absmax, absmax_scale, absmax_offset, bias) + reasons_against_dtype("x", x.dtype)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., k) -> (m, k), neighbours of a row side by side; a view where x allows one."""
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return rows if rows.stride(1) == 1 else rows.contiguous()


def run(x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias) -> torch.Tensor:
    rows, packed, absmax = as_rows(x), packed.contiguous(), absmax.contiguous()
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype)
    bias = bias if bias is None else bias.contiguous()
    native().nf4_linear(
        packed.data_ptr(), absmax.data_ptr(), address(absmax_scale), address(absmax_offset), n, rows.shape[1], block_size,
        code4(quant_type).number, rows.data_ptr(), rows.stride(0), rows.shape[0], NATIVE_DTYPE[x.dtype], address(bias),
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def run_dx(dy, packed, absmax, absmax_scale, absmax_offset, k, block_size, quant_type) -> torch.Tensor:
    rows, packed, absmax = as_rows(dy), packed.contiguous(), absmax.contiguous()
    dx = torch.empty(*dy.shape[:-1], k, dtype=dy.dtype)
    native().nf4_linear_dx(
        packed.data_ptr(), absmax.data_ptr(), address(absmax_scale), address(absmax_offset), rows.shape[1], k, block_size,
        code4(quant_type).number, rows.data_ptr(), rows.stride(0), rows.shape[0], NATIVE_DTYPE[dy.dtype], dx.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return dx


FORWARD = Implementation("cpu", run, reasons_against)
DX = Implementation("cpu", run_dx, reasons_against)
