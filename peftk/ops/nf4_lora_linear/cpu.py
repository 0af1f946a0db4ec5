"""csrc/ops/nf4_lora_linear/cpu.cpp"""

from collections.abc import Iterator

import torch

from peftk.format.nf4 import NF4Weight
from peftk.native import NATIVE_DTYPE, address, native
from peftk.ops.dispatch import Implementation, reasons_against_cpu, reasons_against_dtype
from peftk.ops.nf4_linear.cpu import PLAIN, as_rows, contiguous, straight_code, weight_arguments


def reasons_against(x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, *_) -> list[str]:
    return reasons_against_cpu(x, packed, absmax, A, B, bias, z) + reasons_against_dtypes(x, A, B)


def reasons_against_backward(dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, *_) -> list[str]:
    return reasons_against_cpu(dy, x, z, s, packed, absmax, A, B) + reasons_against_dtypes(dy, A, B)


def reasons_against_many(x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, *_) -> list[str]:
    return reasons_against_cpu(x, *packed, *absmax, *A, *B, *bias, z) + reasons_against_many_dtypes(x, A, B)


def reasons_against_many_backward(dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, *_) -> list[str]:
    return reasons_against_cpu(*dy, x, z, *s, *packed, *absmax, *A, *B) + reasons_against_many_dtypes(x, A, B)


def run_straight(
    x: torch.Tensor, w4: NF4Weight, A: torch.Tensor, B: torch.Tensor, scale: float, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """``run`` past torch's dispatcher, for a call where there is nothing to complain of or to convert; else None."""
    number = straight_code(x, w4, bias)
    if number is None or not is_straight_factors(A, B, w4.shape):
        return None
    (n, k), rows, r = w4.shape, as_rows(x), A.shape[0]
    y, s = x.new_empty((*x.shape[:-1], n)), x.new_empty((rows.shape[0], r))
    weight = (
        w4.packed.data_ptr(), w4.absmax.data_ptr(), address(w4.absmax_scale), address(w4.absmax_offset), n, w4.block_size, number,
    )  # fmt: skip
    branch = (*branch_arguments(A, B), scale, *NO_DROPOUT)
    native().nf4_lora_linear(
        [(weight, branch, address(bias), y.data_ptr(), s.data_ptr())], k, rows.data_ptr(), rows.stride(0), rows.shape[0],
        NATIVE_DTYPE[x.dtype], 0, 0, torch.get_num_threads(),
    )  # fmt: skip
    return y


def is_straight_factors(A: torch.Tensor, B: torch.Tensor, shape: tuple[int, int]) -> bool:
    """Whether A and B fit a weight of this shape and may go to a kernel as they lie, with no gradient wanted."""
    grad = torch.is_grad_enabled()
    for factor in (A, B):
        if type(factor) not in PLAIN or (grad and factor.requires_grad) or not factor.is_cpu or factor.dtype not in NATIVE_DTYPE:
            return False
    n, k = shape
    return A.dim() == 2 and A.shape[1] == k and B.shape == (n, A.shape[0]) and A.is_contiguous() and B.is_contiguous()


def reasons_against_dtypes(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> list[str]:
    return [reason for name, t in (("x", x), ("A", A), ("B", B)) for reason in reasons_against_dtype(name, t.dtype)]


def reasons_against_many_dtypes(x: torch.Tensor, A: list[torch.Tensor], B: list[torch.Tensor]) -> list[str]:
    return [reason for a, b in zip(A, B, strict=True) for reason in reasons_against_dtypes(x, a, b)][:1]


def branch_arguments(A: torch.Tensor, B: torch.Tensor) -> tuple[int, int, int, int, int]:
    return A.data_ptr(), NATIVE_DTYPE[A.dtype], B.data_ptr(), NATIVE_DTYPE[B.dtype], A.shape[0]


def dropout_arguments(p: float, seed: int) -> tuple[int, float, int]:
    return int(p * 2**32), 1 / (1 - p), seed


NO_DROPOUT = dropout_arguments(0.0, 0)


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
