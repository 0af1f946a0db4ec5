"""csrc/ops/nf4_linear/cuda_*.cu"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from peftk.format.code4 import code4
from peftk.native import NATIVE_DTYPE
from peftk.ops import gpu, gpu_product
from peftk.ops.dispatch import Implementation
from peftk.ops.gpu_product import Gradient, Output, Weight
from peftk.ops.nf4_linear import on_gpu

MMA_SINCE = (8, 0)  # compute capability


class Kernels:
    """The launches behind gpu_product.Kernels."""

    backend = "cuda"

    def model(self, device: torch.device) -> gpu.GpuModel:
        return gpu.cuda().model(device)

    def has_tensor_kernels(self, model: gpu.GpuModel) -> bool:
        return model.capability >= MMA_SINCE

    def forward(self, regime: str, tokens: int, x: torch.Tensor, outputs: list[Output]) -> None:
        m, k = x.shape
        wired = [
            (weight_argument(o.weight), o.bias, o.y, o.s, o.b, 0 if o.s is None else o.s.shape[1], o.scale, o.split)
            for o in outputs
        ]
        shape = (tokens,) if regime == "tile" else ()
        sums = gpu_product.partials(outputs, x.device)
        arguments = (wired, k, x, x.stride(0), m, NATIVE_DTYPE[x.dtype], *shape, sums)
        gpu.cuda().call(f"nf4_linear_{regime}", *arguments)

    def backward(self, regime: str, tokens: int, split: int, gradients: list[Gradient], dx: torch.Tensor) -> None:
        m, k = dx.shape
        wired = [
            (weight_argument(g.weight), g.dy, g.dy.stride(0), g.t, g.a, 0 if g.t is None else g.t.shape[1],
             *dropout_arguments(g.dropout, g.seed))
            for g in gradients
        ]  # fmt: skip
        shape = (tokens,) if regime == "tile" else ()
        sums = torch.empty(split, m, k, dtype=torch.float32, device=dx.device) if split > 1 else None
        gpu.cuda().call(f"nf4_linear_dx_{regime}", wired, k, m, NATIVE_DTYPE[dx.dtype], *shape, split, dx, sums)

    def decode(self, weight: Weight, rows: range, columns: range, out: torch.Tensor) -> None:
        chunk = (rows.start, len(rows), columns.start, len(columns))
        gpu.cuda().call("nf4_linear_decode", weight_argument(weight), weight.k, *chunk, out, NATIVE_DTYPE[out.dtype])


def weight_argument(weight: Weight) -> tuple:
    """Weight4 of csrc/format/weight4.h."""
    constants = (weight.packed, weight.absmax, weight.absmax_scale, weight.absmax_offset)
    return (*constants, weight.n, weight.block_size, code4(weight.quant_type).number)


def dropout_arguments(p: float, seed: int) -> tuple[int, float, int]:
    """drop_below, keep_scale and seed of csrc/cuda/philox.cuh."""
    return int(p * 2**32), 1 / (1 - p), seed


def _implementation(
    run: Callable[..., Any], reasons: Callable[..., list[str]], kernel: Callable[..., str] | None = None
) -> Implementation:
    described = kernel and partial(kernel, KERNELS)
    return Implementation("cuda", partial(run, KERNELS), lambda *arguments: reasons(gpu.cuda(), *arguments), described)


KERNELS = Kernels()
FORWARD = _implementation(on_gpu.run, on_gpu.reasons_against, on_gpu.kernel)
DX = _implementation(on_gpu.run_dx, on_gpu.reasons_against, on_gpu.kernel_dx)
MANY = _implementation(on_gpu.run_many, on_gpu.reasons_against_many)
MANY_DX = _implementation(on_gpu.run_many_dx, on_gpu.reasons_against_many)
