"""The op's functions for a backend's ``Kernels`` (gpu_product.py): cuda.py and triton_kernel.py are those for theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftk.ops import dispatch, gpu_product
from peftk.ops.gpu_product import Gradient, Kernels, Output, Weight, as_rows, weights_of


def run_many(
    kernels: Kernels, x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias
) -> list[torch.Tensor]:
    rows = as_rows(x)
    weights = weights_of(packed, absmax, absmax_scale, absmax_offset, n, rows.shape[1], block_size, quant_type)
    ys = [torch.empty(*x.shape[:-1], weight.n, dtype=x.dtype, device=x.device) for weight in weights]
    parts = zip(weights, bias, ys, strict=True)
    outputs = [Output(w, b if b is None else b.contiguous(), y.view(-1, w.n), None, None, 0.0) for w, b, y in parts]
    gpu_product.forward(kernels, rows, outputs)
    return ys


def run(kernels: Kernels, x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias) -> torch.Tensor:
    constants = ([packed], [absmax], [absmax_scale], [absmax_offset])
    return run_many(kernels, x, *constants, [n], [block_size], [quant_type], [bias])[0]


def run_many_dx(kernels: Kernels, dy, packed, absmax, absmax_scale, absmax_offset, k, block_size, quant_type) -> torch.Tensor:
    rows = [as_rows(one) for one in dy]
    weights = weights_of(packed, absmax, absmax_scale, absmax_offset, [one.shape[1] for one in rows], k, block_size, quant_type)
    dx = torch.empty(*dy[0].shape[:-1], k, dtype=dy[0].dtype, device=dy[0].device)
    gradients = [Gradient(w, one, None, None) for w, one in zip(weights, rows, strict=True)]
    gpu_product.backward(kernels, gradients, dx.view(-1, k))
    return dx


def run_dx(kernels: Kernels, dy, packed, absmax, absmax_scale, absmax_offset, k, block_size, quant_type) -> torch.Tensor:
    constants = ([packed], [absmax], [absmax_scale], [absmax_offset])
    return run_many_dx(kernels, [dy], *constants, k, [block_size], [quant_type])


def kernel(kernels: Kernels, x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias=None) -> str:
    """Which kernel takes the arguments of ``run``."""
    weight = Weight(packed, absmax, absmax_scale, absmax_offset, n, x.shape[-1], block_size, quant_type)
    return gpu_product.described(kernels, "forward", x, weight)


def kernel_dx(kernels: Kernels, dy, packed, absmax, absmax_scale, absmax_offset, k, block_size, quant_type) -> str:
    """Which takes those of ``run_dx``."""
    weight = Weight(packed, absmax, absmax_scale, absmax_offset, dy.shape[-1], k, block_size, quant_type)
    return gpu_product.described(kernels, "backward", dy, weight)


def reasons_against(
    door: Any, x, packed, absmax, absmax_scale, absmax_offset, size, block_size, quant_type, bias=None
) -> list[str]:
    """Why a backend's door can't take these: arguments of ``run`` or ``run_dx``."""
    return door.reasons_against(x, packed, absmax, bias) + dispatch.reasons_against_dtype("x", x.dtype)


def reasons_against_many(
    door: Any, x, packed, absmax, absmax_scale, absmax_offset, size, block_size, quant_type, bias=()
) -> list[str]:
    """The same for lists."""
    first = x if isinstance(x, torch.Tensor) else x[0]
    against = door.reasons_against(first, *packed, *absmax, *bias) + dispatch.reasons_against_dtype("x", first.dtype)
    return against + reasons_against_count(packed)


def reasons_against_count(weights: Sequence[Any]) -> list[str]:
    most = gpu_product.MOST_WEIGHTS
    return [f"a list of {len(weights)} weights, a launch takes {most}"] if len(weights) > most else []
