"""csrc/ops/nf4_linear/cpu.cpp"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from peftk.format.code4 import code4
from peftk.format.nf4 import NF4Weight
from peftk.native import NATIVE_DTYPE, address, native
from peftk.ops import dispatch
from peftk.ops.dispatch import Implementation, reasons_against_cpu, reasons_against_dtype
from peftk.ops.nf4_dequantize import check_constants


def reasons_against(x, packed, absmax, absmax_scale, absmax_offset, size, block_size, quant_type, bias=None) -> list[str]:
    return reasons_against_cpu(x, packed, absmax, absmax_scale, absmax_offset, bias) + reasons_against_dtype("x", x.dtype)


def reasons_against_many(x, packed, absmax, absmax_scale, absmax_offset, size, block_size, quant_type, bias=()) -> list[str]:
    first = x if isinstance(x, torch.Tensor) else x[0]
    return reasons_against_cpu(first, *packed, *absmax, *absmax_scale, *absmax_offset, *bias) + reasons_against_dtype(
        "x", first.dtype
    )


def run_straight(x: torch.Tensor, w4: NF4Weight, bias: torch.Tensor | None, kernel: str = "nf4_linear") -> torch.Tensor | None:
    """``run`` for a call that ``dispatch.is_straight``, where there is nothing to complain of or to convert; else None.
    ``kernel``: of those that share nf4_linear's arguments."""
    number = straight_code(x, w4, bias)
    if number is None:
        return None
    n, k = w4.shape
    first, stride, m = rows_of(x, k)
    y = x.new_empty((*x.shape[:-1], n))
    getattr(native(), kernel)(
        w4.packed.data_ptr(), w4.absmax.data_ptr(), address(w4.absmax_scale), address(w4.absmax_offset), n, k, w4.block_size,
        number, first.data_ptr(), stride, m, NATIVE_DTYPE[x.dtype], address(bias), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def straight_code(x: torch.Tensor, w4: NF4Weight, bias: torch.Tensor | None) -> int | None:
    """The number of w4's code where a product of these may go straight to its kernel, else None."""
    if not dispatch.is_straight(x):
        return None
    if bias is not None and (type(bias) not in PLAIN or (bias.requires_grad and torch.is_grad_enabled())):
        return None
    number = w4.__dict__.get("_straight_code")
    if number is None:
        number = w4.__dict__["_straight_code"] = _straight_code(w4)
    if number < 0 or x.dim() == 0:
        return None
    n, k = w4.shape
    if x.shape[-1] != k or w4.packed.numel() != (n * k + 1) // 2 or w4.absmax.numel() != -(-n * k // w4.block_size):
        return None
    if x.dtype not in NATIVE_DTYPE or not (
        bias is None or (bias.dtype is x.dtype and bias.is_cpu and bias.shape == (n,) and bias.is_contiguous())
    ):
        return None
    return number


FEW_ROWS = 48  # as kStripsUpTo in csrc/cpu/strips_bf16.h: no panels, so weights share nothing of x worth a dispatcher's 50 us


def run_straight_many(x: torch.Tensor, w4: Sequence[NF4Weight], bias: Any) -> list[torch.Tensor] | None:
    """``run_straight`` for each of a list of weights, where x has few rows and nothing is to complain of; else None."""
    biases = bias if isinstance(bias, (list, tuple)) else [None] * len(w4)
    if x.dim() == 0 or x.numel() > FEW_ROWS * x.shape[-1] or len(biases) != len(w4) or not (bias is None or bias is biases):
        return None
    ys = []
    for weight, one in zip(w4, biases, strict=True):
        try:
            y = run_straight(x, weight, one) if type(weight) is NF4Weight else None
        except (TypeError, ValueError):  # parts that don't fit: the checks of a list name the weight
            return None
        if y is None:
            return None
        ys.append(y)
    return ys or None


PLAIN = (torch.Tensor, torch.nn.Parameter)


def _straight_code(w4: NF4Weight) -> int:
    """The number of w4's code where its parts fit each other and lie plainly in this machine's memory, else -1."""
    parts = [t for t in w4.tensors() if t is not None]
    if len(w4.shape) != 2 or any(type(t) not in PLAIN or not t.is_cpu for t in parts):
        return -1
    check_constants(*w4.tensors(), w4.shape.numel(), w4.block_size, w4.quant_type)
    return code4(w4.quant_type).number


def rows_of(x: torch.Tensor, k: int) -> tuple[torch.Tensor, int, int]:
    """``as_rows`` without a view where x is contiguous: a tensor that starts at the first row, elements from row to row, rows."""
    if x.is_contiguous() and k:
        return x, k, x.numel() // k
    rows = as_rows(x)
    return rows, rows.stride(0), rows.shape[0]


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
    return run_many_dx([dy], [packed], [absmax], [absmax_scale], [absmax_offset], k, [block_size], [quant_type])


def weight_arguments(packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type) -> Iterator[tuple[int, ...]]:
    """Weight4 of csrc/format/weight4.h for each of a list of weights whose codes and constants are contiguous."""
    for codes, scales, scale, offset, rows, size, kind in zip(
        packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, strict=True
    ):
        yield codes.data_ptr(), scales.data_ptr(), address(scale), address(offset), rows, size, code4(kind).number


def contiguous(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [t if t is None else t.contiguous() for t in tensors]


def run_many(x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias) -> list[torch.Tensor]:
    rows, packed, absmax, bias = as_rows(x), contiguous(packed), contiguous(absmax), contiguous(bias)
    ys = [torch.empty(*x.shape[:-1], one, dtype=x.dtype) for one in n]
    weights = weight_arguments(packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type)
    native().nf4_linear_many(
        [(weight, address(b), y.data_ptr()) for weight, b, y in zip(weights, bias, ys, strict=True)], rows.shape[1],
        rows.data_ptr(), rows.stride(0), rows.shape[0], NATIVE_DTYPE[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return ys


def run_many_dx(dy, packed, absmax, absmax_scale, absmax_offset, k, block_size, quant_type) -> torch.Tensor:
    rows, packed, absmax = [as_rows(one) for one in dy], contiguous(packed), contiguous(absmax)
    dx = torch.empty(*dy[0].shape[:-1], k, dtype=dy[0].dtype)
    n = [one.shape[1] for one in rows]
    weights = weight_arguments(packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type)
    native().nf4_linear_dx(
        [(weight, one.data_ptr(), one.stride(0)) for weight, one in zip(weights, rows, strict=True)], k, rows[0].shape[0],
        NATIVE_DTYPE[dx.dtype], dx.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dx


FORWARD = Implementation("cpu", run, reasons_against)
DX = Implementation("cpu", run_dx, reasons_against)
MANY = Implementation("cpu", run_many, reasons_against_many)
MANY_DX = Implementation("cpu", run_many_dx, reasons_against_many)
