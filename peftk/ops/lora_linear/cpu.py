"""csrc/ops/lora_linear/cpu.cpp"""

import torch

from peftk.native import NATIVE_DTYPE, address, native
from peftk.ops.dispatch import Implementation, reasons_against_cpu
from peftk.ops.nf4_linear.cpu import as_rows
from peftk.ops.nf4_lora_linear.cpu import branch_arguments, dropout_arguments, reasons_against_dtypes


def reasons_against(x, weight, A, B, bias, z, *_) -> list[str]:
    return reasons_against_cpu(x, weight, A, B, bias, z) + reasons_against_dtypes(x, A, B)


def reasons_against_backward(dy, x, z, s, weight, A, B, *_) -> list[str]:
    return reasons_against_cpu(dy, x, z, s, weight, A, B) + reasons_against_dtypes(dy, A, B)


def _stored(weight: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """What lies in memory for W (n, k): a matrix whose rows lie side by side, elements from row to row, 1 where it is (k, n)."""
    if weight.stride(1) != 1 and weight.stride(0) == 1:
        return weight, weight.stride(1), 1
    rows = as_rows(weight)
    return rows, rows.stride(0), 0


def run(x, weight, A, B, bias, z, scale, dropout, seed) -> tuple[torch.Tensor, torch.Tensor]:
    (w, w_stride, w_turned), A, B = _stored(weight), A.contiguous(), B.contiguous()
    rows, branch_rows = as_rows(x), z if z is None else as_rows(z)
    bias = bias if bias is None else bias.contiguous()
    y = torch.empty(*x.shape[:-1], B.shape[0], dtype=x.dtype)
    s = torch.empty(*x.shape[:-1], A.shape[0], dtype=x.dtype)
    native().lora_linear(
        w.data_ptr(), w_stride, w_turned, *weight.shape, rows.data_ptr(), rows.stride(0), rows.shape[0], NATIVE_DTYPE[x.dtype],
        address(branch_rows), 0 if z is None else branch_rows.stride(0), *branch_arguments(A, B), scale, address(bias),
        *dropout_arguments(dropout, seed), y.data_ptr(), s.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y, s


def run_backward(
    dy, x, z, s, weight, A, B, scale, dropout, seed, need_dx, need_dz
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (w, w_stride, w_turned), s, A, B = _stored(weight), s.contiguous(), A.contiguous(), B.contiguous()
    rows, branch_rows = as_rows(dy), as_rows(x if z is None else z)
    dx = torch.empty(x.shape if need_dx else (0,), dtype=dy.dtype)
    dz = torch.empty(x.shape if need_dz else (0,), dtype=dy.dtype)
    dA, dB = torch.empty(A.shape, dtype=A.dtype), torch.empty(B.shape, dtype=B.dtype)
    if rows.shape[0] == 0:
        return dx, dz, dA.zero_(), dB.zero_()
    native().lora_linear_backward(
        w.data_ptr(), w_stride, w_turned, *weight.shape, rows.data_ptr(), rows.stride(0), rows.shape[0], NATIVE_DTYPE[dy.dtype],
        branch_rows.data_ptr(), branch_rows.stride(0), s.data_ptr(), *branch_arguments(A, B), scale,
        *dropout_arguments(dropout, seed), int(z is None), dx.data_ptr() if need_dx else 0, dz.data_ptr() if need_dz else 0,
        dA.data_ptr(), dB.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dx, dz, dA, dB


FORWARD = Implementation("cpu", run, reasons_against)
BACKWARD = Implementation("cpu", run_backward, reasons_against_backward)
