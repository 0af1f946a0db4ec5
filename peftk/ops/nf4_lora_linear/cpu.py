"""csrc/ops/nf4_lora_linear/cpu.cpp"""

import torch

from peftk.format.code4 import code4
from peftk.native import NATIVE_DTYPE, address, native
from peftk.ops.dispatch import Implementation, reasons_against_cpu, reasons_against_dtype
from peftk.ops.nf4_linear.cpu import as_rows


def reasons_against(x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, *_) -> list[str]:
    return reasons_against_cpu(x, packed, absmax, A, B, bias, z) + reasons_against_dtypes(x, A, B)


def reasons_against_backward(dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, *_) -> list[str]:
    return reasons_against_cpu(dy, x, z, s, packed, absmax, A, B) + reasons_against_dtypes(dy, A, B)


def reasons_against_dtypes(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> list[str]:
    return [reason for name, t in (("x", x), ("A", A), ("B", B)) for reason in reasons_against_dtype(name, t.dtype)]


def branch_arguments(A: torch.Tensor, B: torch.Tensor) -> tuple[int, int, int, int, int]:
    return A.data_ptr(), NATIVE_DTYPE[A.dtype], B.data_ptr(), NATIVE_DTYPE[B.dtype], A.shape[0]


def dropout_arguments(p: float, seed: int) -> tuple[int, float, int]:
    return int(p * 2**32), 1 / (1 - p), seed


def run(
    x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, scale, block_size, quant_type, dropout, seed
) -> tuple[torch.Tensor, torch.Tensor]:
    packed, absmax, A, B = packed.contiguous(), absmax.contiguous(), A.contiguous(), B.contiguous()
    rows, branch_rows = as_rows(x), z if z is None else as_rows(z)
    bias = bias if bias is None else bias.contiguous()
    y = torch.empty(*x.shape[:-1], B.shape[0], dtype=x.dtype)
    s = torch.empty(*x.shape[:-1], A.shape[0], dtype=x.dtype)
    native().nf4_lora_linear(
        packed.data_ptr(), absmax.data_ptr(), address(absmax_scale), address(absmax_offset), B.shape[0], rows.shape[1],
        block_size, code4(quant_type).number, rows.data_ptr(), rows.stride(0), rows.shape[0], NATIVE_DTYPE[x.dtype],
        address(branch_rows), 0 if z is None else branch_rows.stride(0), *branch_arguments(A, B), scale, address(bias),
        *dropout_arguments(dropout, seed), y.data_ptr(), s.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y, s


def run_backward(
    dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, scale, block_size, quant_type, dropout, seed,
    need_dx, need_dz,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    packed, absmax, s, A, B = packed.contiguous(), absmax.contiguous(), s.contiguous(), A.contiguous(), B.contiguous()
    rows, branch_rows = as_rows(dy), as_rows(x if z is None else z)
    dx = torch.empty(x.shape if need_dx else (0,), dtype=dy.dtype)
    dz = torch.empty(x.shape if need_dz else (0,), dtype=dy.dtype)
    dA, dB = torch.empty(A.shape, dtype=A.dtype), torch.empty(B.shape, dtype=B.dtype)
    if rows.shape[0] == 0:
        return dx, dz, dA.zero_(), dB.zero_()
    native().nf4_lora_linear_backward(
        packed.data_ptr(), absmax.data_ptr(), address(absmax_scale), address(absmax_offset), B.shape[0], A.shape[1],
        block_size, code4(quant_type).number, rows.data_ptr(), rows.stride(0), rows.shape[0], NATIVE_DTYPE[dy.dtype],
        branch_rows.data_ptr(), branch_rows.stride(0), s.data_ptr(), *branch_arguments(A, B), scale,
        *dropout_arguments(dropout, seed), int(z is None), dx.data_ptr() if need_dx else 0, dz.data_ptr() if need_dz else 0,
        dA.data_ptr(), dB.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dx, dz, dA, dB


FORWARD = Implementation("cpu", run, reasons_against)
BACKWARD = Implementation("cpu", run_backward, reasons_against_backward)
