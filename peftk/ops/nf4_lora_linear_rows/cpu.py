"""csrc/ops/nf4_lora_linear_rows/cpu.cpp"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from peftk.format.nf4 import NF4Weight
from peftk.native import NATIVE_DTYPE, address, native
from peftk.ops.dispatch import Implementation, reasons_against_cpu
from peftk.ops.nf4_linear.cpu import as_rows, contiguous, straight_code, weight_arguments
from peftk.ops.nf4_lora_linear.cpu import branch_arguments, is_straight_factors, reasons_against_many_dtypes
from peftk.ops.nf4_lora_linear_rows.groups import counts, repeats


def reasons_against(x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, *_) -> list[str]:
    return reasons_against_cpu(x, packed, absmax, *A, *B, bias, z) + reasons_against_many_dtypes(x, A, B)


def reasons_against_backward(dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, *_) -> list[str]:
    return reasons_against_cpu(dy, x, z, *s, packed, absmax, *A, *B) + reasons_against_many_dtypes(x, A, B)


def run_straight(
    x: torch.Tensor,
    w4: NF4Weight,
    A: Sequence[torch.Tensor],
    B: Sequence[torch.Tensor],
    scale: Sequence[float],
    index: Sequence[int],
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
) -> torch.Tensor | None:
    """``run`` for a call past torch's dispatcher, where there is nothing to complain of or to convert; else None."""
    if z is not None or straight_code(x, w4, bias) is None or not len(A) == len(B) == len(scale):
        return None
    if x.dim() < 2 or len(index) != x.shape[0] or (index and not (min(index) >= -1 and max(index) < len(A))):
        return None
    if not all(is_straight_factors(a, b, w4.shape) for a, b in zip(A, B, strict=True)):
        return None
    return run(x, *w4.tensors(), A, B, bias, None, index, scale, w4.shape[0], w4.block_size, w4.quant_type)[0]


def run(
    x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, index, scale, n, block_size, quant_type
) -> list[torch.Tensor]:
    packed, absmax, A, B = packed.contiguous(), absmax.contiguous(), contiguous(A), contiguous(B)
    rows, branch_rows = as_rows(x), z if z is None else as_rows(z)
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype)
    kept = [torch.empty(count, a.shape[0], dtype=x.dtype) for count, a in zip(counts(index, x, len(A)), A, strict=True)]
    bias = bias if bias is None else bias.contiguous()
    native().nf4_lora_linear_rows(
        _weight(packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type),
        [(factors, s.data_ptr()) for factors, s in zip(_factors(A, B, scale), kept, strict=True)], index, repeats(x),
        rows.shape[1], rows.data_ptr(), rows.stride(0), NATIVE_DTYPE[x.dtype], address(branch_rows),
        0 if z is None else branch_rows.stride(0), address(bias), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return [y, *kept]


def run_backward(
    dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, index, scale, n, block_size, quant_type, need_dx, need_dz
) -> list[torch.Tensor]:
    packed, absmax, s, A, B = packed.contiguous(), absmax.contiguous(), contiguous(s), contiguous(A), contiguous(B)
    rows, branch_rows = as_rows(dy), as_rows(x if z is None else z)
    dx, dz = (torch.empty(x.shape if need else (0,), dtype=x.dtype) for need in (need_dx, need_dz))
    idle = [not one.shape[0] for one in s]  # adapters without rows, which the kernel passes over
    dA, dB = ([_gradient(f, zero) for f, zero in zip(factors, idle, strict=True)] for factors in (A, B))
    native().nf4_lora_linear_rows_backward(
        _weight(packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type),
        [
            (factors, si.data_ptr(), da.data_ptr(), db.data_ptr())
            for factors, si, da, db in zip(_factors(A, B, scale), s, dA, dB, strict=True)
        ],
        index, repeats(x), x.shape[-1], rows.data_ptr(), rows.stride(0), NATIVE_DTYPE[x.dtype], branch_rows.data_ptr(),
        branch_rows.stride(0), int(z is None), dx.data_ptr() if need_dx else 0, dz.data_ptr() if need_dz else 0,
        torch.get_num_threads(),
    )  # fmt: skip
    return [dx, dz, *dA, *dB]


def _gradient(factor: torch.Tensor, zero: bool) -> torch.Tensor:
    return (torch.zeros if zero else torch.empty)(factor.shape, dtype=factor.dtype)


def _weight(packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type) -> tuple[int, ...]:
    lists = ([part] for part in (packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type))
    return next(weight_arguments(*lists))


def _factors(A, B, scale) -> Iterator[tuple[int | float, ...]]:
    """AdapterFactors of csrc/ops/nf4_lora_linear_rows/op.h."""
    for a, b, one in zip(A, B, scale, strict=True):
        yield *branch_arguments(a, b), one


FORWARD = Implementation("cpu", run, reasons_against)
BACKWARD = Implementation("cpu", run_backward, reasons_against_backward)
