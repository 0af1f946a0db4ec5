"""The op's functions for a backend: its ``Kernels`` for products with W (gpu_product.py) and its ``Thin`` ones for what lies
beside W. Forward S, then y from it; backward T, then dx from it, then dA and dB."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from peftk.ops import dispatch, gpu_product
from peftk.ops.gpu_product import Gradient, Kernels, Outer, Output, Shrink, as_rows, weights_of
from peftk.ops.nf4_linear import on_gpu as nf4_on_gpu
from peftk.ops.nf4_linear.on_gpu import reasons_against_count


class Thin(Protocol):
    """What a backend has; m is the same for all of a list."""

    def shrink(self, products: list[Shrink]) -> None: ...
    def outer(self, products: list[Outer]) -> None: ...


def run_many(
    kernels: Kernels, thin: Thin, x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, scale, block_size, quant_type,
    dropout, seed,
) -> list[torch.Tensor]:  # fmt: skip
    """Every y, then every S."""
    rows, branch = as_rows(x), as_rows(x if z is None else z)
    n, k = [b.shape[0] for b in B], rows.shape[1]
    weights = weights_of(packed, absmax, absmax_scale, absmax_offset, n, k, block_size, quant_type)
    ys = [torch.empty(*x.shape[:-1], one, dtype=x.dtype, device=x.device) for one in n]
    kept = [torch.empty(*x.shape[:-1], a.shape[0], dtype=x.dtype, device=x.device) for a in A]
    if not rows.shape[0]:
        return [*ys, *kept]
    A, B = ([factor.to(x.dtype).contiguous() for factor in factors] for factors in (A, B))
    low = [s.view(-1, s.shape[-1]) for s in kept]
    thin.shrink([Shrink(branch, a.t(), 1.0, dropout, one, s) for a, one, s in zip(A, seed, low, strict=True)])
    outputs = [
        Output(weight, b if b is None else b.contiguous(), y.view(-1, weight.n), s, factor, one)
        for weight, b, y, s, factor, one in zip(weights, bias, ys, low, B, scale, strict=True)
    ]
    gpu_product.forward(kernels, rows, outputs)
    return [*ys, *kept]


def run(
    kernels: Kernels, thin: Thin, x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, scale, block_size, quant_type,
    dropout, seed,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    weight, facts = ([packed], [absmax], [absmax_scale], [absmax_offset], [A], [B]), ([scale], [block_size], [quant_type])
    y, s = run_many(kernels, thin, x, *weight, [bias], z, *facts, dropout, [seed])
    return y, s


def run_many_backward(
    kernels: Kernels, thin: Thin, dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, scale, block_size, quant_type,
    dropout, seed, need_dx, need_dz,
) -> list[torch.Tensor]:  # fmt: skip
    """dx, dz, then every dA, then every dB."""
    dtype, device = x.dtype, x.device
    rows, branch = [as_rows(one) for one in dy], as_rows(x if z is None else z)
    (m, k), n = branch.shape, [b.shape[0] for b in B]
    dx, dz = (torch.empty(x.shape if need else (0,), dtype=dtype, device=device) for need in (need_dx, need_dz))
    dA, dB = ([torch.empty(factor.shape, dtype=factor.dtype, device=device) for factor in factors] for factors in (A, B))
    if not m:
        return [dx, dz, *(factor.zero_() for factor in (*dA, *dB))]
    weights = weights_of(packed, absmax, absmax_scale, absmax_offset, n, k, block_size, quant_type)
    A, B = ([factor.to(dtype).contiguous() for factor in factors] for factors in (A, B))
    T = [torch.empty(m, a.shape[0], dtype=dtype, device=device) for a in A]
    thin.shrink([Shrink(one, b, factor, 0.0, 0, t) for one, b, factor, t in zip(rows, B, scale, T, strict=True)])
    branches = [
        Gradient(weight, one, t, a, dropout, number) for weight, one, t, a, number in zip(weights, rows, T, A, seed, strict=True)
    ]
    if need_dx:
        bare = [Gradient(weight, one, None, None) for weight, one in zip(weights, rows, strict=True)]
        gpu_product.backward(kernels, branches if z is None else bare, dx.view(m, k))
    if need_dz:
        gpu_product.low_rank_gradient(branches, dz.view(m, k))
    low = [one.reshape(m, -1) for one in s]
    thin.outer(
        [Outer(t, branch, 1.0, dropout, number, da) for t, number, da in zip(T, seed, dA, strict=True)]
        + [Outer(one, row, factor, 0.0, 0, db.t()) for one, row, factor, db in zip(low, rows, scale, dB, strict=True)]
    )
    return [dx, dz, *dA, *dB]


def run_backward(
    kernels: Kernels, thin: Thin, dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, scale, block_size, quant_type,
    dropout, seed, need_dx, need_dz,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    weight, facts = ([packed], [absmax], [absmax_scale], [absmax_offset], [A], [B]), ([scale], [block_size], [quant_type])
    dx, dz, dA, dB = run_many_backward(kernels, thin, [dy], x, z, [s], *weight, *facts, dropout, [seed], need_dx, need_dz)
    return dx, dz, dA, dB


def kernel(
    kernels: Kernels, x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, scale, block_size, quant_type, *_
) -> str:
    """Which kernel takes the product with W of ``run``."""
    return nf4_on_gpu.kernel(kernels, x, packed, absmax, absmax_scale, absmax_offset, B.shape[0], block_size, quant_type)


def kernel_backward(
    kernels: Kernels, dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, scale, block_size, quant_type, *_
) -> str:
    """Which takes that of ``run_backward``."""
    return nf4_on_gpu.kernel_dx(kernels, dy, packed, absmax, absmax_scale, absmax_offset, A.shape[1], block_size, quant_type)


def reasons_against(door: Any, x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, *_) -> list[str]:
    """Why a backend's door can't take these."""
    return door.reasons_against(x, packed, absmax, A, B, bias, z) + _reasons_against_dtypes(x, [A], [B])


def reasons_against_backward(door: Any, dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, *_) -> list[str]:
    """The same for ``run_backward``."""
    return door.reasons_against(dy, x, z, s, packed, absmax, A, B) + _reasons_against_dtypes(dy, [A], [B])


def reasons_against_many(door: Any, x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, *_) -> list[str]:
    """The same for ``run_many``."""
    against = door.reasons_against(x, *packed, *absmax, *A, *B, *bias, z)
    return against + _reasons_against_dtypes(x, A, B) + reasons_against_count(packed)


def reasons_against_many_backward(door: Any, dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, *_) -> list[str]:
    """The same for ``run_many_backward``."""
    against = door.reasons_against(*dy, x, z, *s, *packed, *absmax, *A, *B)
    return against + _reasons_against_dtypes(x, A, B) + reasons_against_count(packed)


def _reasons_against_dtypes(x: torch.Tensor, A: list[torch.Tensor], B: list[torch.Tensor]) -> list[str]:
    named = [("x", x), *(("A", a) for a in A), *(("B", b) for b in B)]
    return [reason for name, t in named for reason in dispatch.reasons_against_dtype(name, t.dtype)][:1]
