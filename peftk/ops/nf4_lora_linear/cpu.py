"""csrc/ops/nf4_lora_linear/cpu.cpp"""

from collections.abc import Iterator

import torch

from peftk.native import NATIVE_DTYPE, address, native
from peftk.ops.dispatch import Implementation, reasons_against_cpu, reasons_against_dtype
from peftk.ops.nf4_linear.cpu import as_rows, contiguous, weight_arguments


def reasons_against(x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, *_) -> list[str]:
    return reasons_against_cpu(x, packed, absmax, A, B, bias, z) + reasons_against_dtypes(x, A, B)


def reasons_against_backward(dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, *_) -> list[str]:
    return reasons_against_cpu(dy, x, z, s, packed, absmax, A, B) + reasons_against_dtypes(dy, A, B)


def reasons_against_many(x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, *_) -> list[str]:
    return reasons_against_cpu(x, *packed, *absmax, *A, *B, *bias, z) + reasons_against_many_dtypes(x, A, B)


def reasons_against_many_backward(dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, *_) -> list[str]:
    return reasons_against_cpu(*dy, x, z, *s, *packed, *absmax, *A, *B) + reasons_against_many_dtypes(x, A, B)


def reasons_against_dtypes(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> list[str]:
    return [reason for name, t in (("x", x), ("A", A), ("B", B)) for reason in reasons_against_dtype(name, t.dtype)]


def reasons_against_many_dtypes(x: torch.Tensor, A: list[torch.Tensor], B: list[torch.Tensor]) -> list[str]:
    return [reason for a, b in zip(A, B, strict=True) for reason in reasons_against_dtypes(x, a, b)][:1]


def branch_arguments(A: torch.Tensor, B: torch.Tensor) -> tuple[int, int, int, int, int]:
    return A.data_ptr(), NATIVE_DTYPE[A.dtype], B.data_ptr(), NATIVE_DTYPE[B.dtype], A.shape[0]


def dropout_arguments(p: float, seed: int) -> tuple[int, float, int]:
    return int(p * 2**32), 1 / (1 - p), seed


def low_rank_arguments(A, B, scale, dropout, seed) -> Iterator[tuple[int | float, ...]]:
    """LowRank of csrc/ops/nf4_lora_linear/op.h for each branch of a list."""
    for a, b, factor, one in zip(A, B, scale, seed, strict=True):
        yield *branch_arguments(a, b), factor, *dropout_arguments(dropout, one)


def run(
    x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, scale, block_size, quant_type, dropout, seed
) -> tuple[torch.Tensor, torch.Tensor]:
    y, s = run_many(
        x, [packed], [absmax], [absmax_scale], [absmax_offset], [A], [B], [bias], z, [scale], [block_size], [quant_type],
        dropout, [seed],
    )  # fmt: skip
    return y, s


def run_many(
    x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, scale, block_size, quant_type, dropout, seed
) -> list[torch.Tensor]:
    packed, absmax, A, B, bias = (contiguous(parts) for parts in (packed, absmax, A, B, bias))
    rows, branch_rows = as_rows(x), z if z is None else as_rows(z)
    ys = [torch.empty(*x.shape[:-1], b.shape[0], dtype=x.dtype) for b in B]
    kept = [torch.empty(*x.shape[:-1], a.shape[0], dtype=x.dtype) for a in A]
    n = [b.shape[0] for b in B]
    weights = weight_arguments(packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type)
    branches = low_rank_arguments(A, B, scale, dropout, seed)
    outputs = zip(weights, branches, bias, ys, kept, strict=True)
    native().nf4_lora_linear(
        [(weight, branch, address(b), y.data_ptr(), s.data_ptr()) for weight, branch, b, y, s in outputs], rows.shape[1],
        rows.data_ptr(), rows.stride(0), rows.shape[0], NATIVE_DTYPE[x.dtype], address(branch_rows),
        0 if z is None else branch_rows.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    return [*ys, *kept]


def run_backward(
    dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, scale, block_size, quant_type, dropout, seed,
    need_dx, need_dz,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    dx, dz, dA, dB = run_many_backward(
        [dy], x, z, [s], [packed], [absmax], [absmax_scale], [absmax_offset], [A], [B], [scale], [block_size], [quant_type],
        dropout, [seed], need_dx, need_dz,
    )  # fmt: skip
    return dx, dz, dA, dB


def run_many_backward(
    dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, scale, block_size, quant_type, dropout, seed,
    need_dx, need_dz,
) -> list[torch.Tensor]:  # fmt: skip
    packed, absmax, s, A, B = (contiguous(parts) for parts in (packed, absmax, s, A, B))
    rows, branch_rows = [as_rows(one) for one in dy], as_rows(x if z is None else z)
    dx, dz = (torch.empty(x.shape if need else (0,), dtype=x.dtype) for need in (need_dx, need_dz))
    dA, dB = ([torch.empty(factor.shape, dtype=factor.dtype) for factor in factors] for factors in (A, B))
    if branch_rows.shape[0] == 0:
        return [dx, dz, *(factor.zero_() for factor in (*dA, *dB))]
    n = [b.shape[0] for b in B]
    weights = weight_arguments(packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type)
    branches = low_rank_arguments(A, B, scale, dropout, seed)
    native().nf4_lora_linear_backward(
        [
            (weight, branch, one.data_ptr(), one.stride(0), si.data_ptr(), da.data_ptr(), db.data_ptr())
            for weight, branch, one, si, da, db in zip(weights, branches, rows, s, dA, dB, strict=True)
        ],
        branch_rows.shape[1], branch_rows.shape[0], NATIVE_DTYPE[x.dtype], branch_rows.data_ptr(), branch_rows.stride(0),
        int(z is None), dx.data_ptr() if need_dx else 0, dz.data_ptr() if need_dz else 0, torch.get_num_threads(),
    )  # fmt: skip
    return [dx, dz, *dA, *dB]


FORWARD = Implementation("cpu", run, reasons_against)
BACKWARD = Implementation("cpu", run_backward, reasons_against_backward)
MANY = Implementation("cpu", run_many, reasons_against_many)
MANY_BACKWARD = Implementation("cpu", run_many_backward, reasons_against_many_backward)
