"""csrc/ops/nf4_lora_linear/cuda_*.cu beside nf4_linear's kernels."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from peftk.native import NATIVE_DTYPE
from peftk.ops import gpu
from peftk.ops.dispatch import Implementation
from peftk.ops.gpu_product import Outer, Shrink
from peftk.ops.nf4_linear.cuda import KERNELS, dropout_arguments
from peftk.ops.nf4_lora_linear import on_gpu

MOST_PRODUCTS = 16  # of a launch: as kMostWeights in csrc/cuda/weight4.cuh
BLOCKS = 2  # a multiprocessor that a thin product should have: its inner dimension is split until it has them
SHRINK_ROWS, OUTER_COLUMNS = 64, 64  # of the wide matrix a thread block takes
LEAST_DEPTH = 256  # of the inner dimension that a thread block should have to itself


class Thin:
    """The launches behind on_gpu.Thin: a launch takes products of one split, which depends on nothing but the product."""

    def shrink(self, products: list[Shrink]) -> None:
        for split, group in grouped(products, lambda p: split_of(p.wide, p.wide.shape[0], SHRINK_ROWS, p.wide.shape[1])):
            wired = [
                (p.wide, p.wide.stride(0), p.wide.shape[1], p.factor, *p.factor.stride(), p.factor.shape[1], p.scale,
                 *dropout_arguments(p.dropout, p.seed), p.out)
                for p in group
            ]  # fmt: skip
            _call("nf4_lora_linear_shrink", group, wired, split)

    def outer(self, products: list[Outer]) -> None:
        for split, group in grouped(products, lambda p: split_of(p.wide, p.wide.shape[1], OUTER_COLUMNS, p.wide.shape[0])):
            wired = [
                (p.thin, p.thin.shape[1], p.wide, p.wide.stride(0), p.wide.shape[1], p.scale,
                 *dropout_arguments(p.dropout, p.seed), p.out, *p.out.stride(), NATIVE_DTYPE[p.out.dtype])
                for p in group
            ]  # fmt: skip
            _call("nf4_lora_linear_outer", group, wired, split)


def grouped(products: Sequence[Any], split: Callable[[Any], int]) -> Iterator[tuple[int, list[Any]]]:
    """Lists of at most MOST_PRODUCTS that have one split."""
    by_split: dict[int, list[Any]] = {}
    for product in products:
        by_split.setdefault(split(product), []).append(product)
    for count, group in by_split.items():
        for at in range(0, len(group), MOST_PRODUCTS):
            yield count, group[at : at + MOST_PRODUCTS]


def split_of(wide: torch.Tensor, extent: int, block: int, depth: int) -> int:
    """Runs of an inner dimension of ``depth``, where a thread block takes ``block`` of the wide matrix's other ``extent``."""
    wanted = BLOCKS * gpu.cuda().model(wide.device).multiprocessors * block // max(extent, 1)
    return max(1, min(wanted, depth // LEAST_DEPTH))


def _call(function: str, products: Sequence[Any], wired: list[tuple], split: int) -> None:
    wide, count = products[0].wide, sum(p.out.numel() for p in products)
    sums = torch.empty(split * count, dtype=torch.float32, device=wide.device) if split > 1 else None
    gpu.cuda().call(function, wired, wide.shape[0], NATIVE_DTYPE[wide.dtype], split, sums)


def _implementation(
    run: Callable[..., Any], reasons: Callable[..., list[str]], kernel: Callable[..., str] | None = None
) -> Implementation:
    described = kernel and partial(kernel, KERNELS)
    return Implementation("cuda", partial(run, KERNELS, THIN), lambda *arguments: reasons(gpu.cuda(), *arguments), described)


THIN = Thin()
FORWARD = _implementation(on_gpu.run, on_gpu.reasons_against, on_gpu.kernel)
BACKWARD = _implementation(on_gpu.run_backward, on_gpu.reasons_against_backward, on_gpu.kernel_backward)
MANY = _implementation(on_gpu.run_many, on_gpu.reasons_against_many)
MANY_BACKWARD = _implementation(on_gpu.run_many_backward, on_gpu.reasons_against_many_backward)
