"""triton_forward.py, triton_backward.py, triton_decode.py behind gpu_product.Kernels: tiles as data, lists into launches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import torch
import triton

from peftk.format.code4 import values4
from peftk.format.dynamic8 import values8
from peftk.ops import gpu
from peftk.ops.gpu_product import BLOCK, Gradient, Output, Weight
from peftk.ops.nf4_linear import on_gpu, triton_decode
from peftk.ops.nf4_linear.triton_backward import nf4_linear_backward
from peftk.ops.nf4_linear.triton_forward import nf4_linear_forward
from peftk.ops.nf4_linear.triton_sums import add_runs
from peftk.ops.triton_words import EXACT, sealed

MMA_SINCE = (8, 0)  # compute capability; AMD's gfx numbers are all larger
One = TypeVar("One")


@dataclass(frozen=True)
class Tile:
    """Of one program. rows: of W forward, columns of it backward; depth: of the inner dimension a round."""

    tokens: int
    rows: int
    depth: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages, **EXACT}


# By tokens, for both products: 6.5, 6.8, 8.6 and 10.0 instructions a weight forward, 7.0, 7.5, 9.4 and 10.8 backward (sm_80; on
# sm_90 8.3 and 9.2 at 128 tokens). 64 tokens by 4 warps spill. Counted, not timed.
TILES = {
    16: Tile(16, 128, 64, 4, 4),
    32: Tile(32, 128, 64, 4, 4),
    64: Tile(64, 128, 64, 8, 3),
    128: Tile(128, 128, 64, 8, 3),
}
# What is above spills there: scalar registers with 4 wavefronts (gfx942), vector ones with a depth of 64 (gfx1100).
AMD_TILES = {**{tokens: Tile(tokens, 128, 64, 8, 3) for tokens in (16, 32, 64)}, 128: Tile(128, 128, 32, 8, 3)}
# Products without tensor cores (fp32, Turing) hold both operands of a round in registers; odd shapes.
SIMPLE_TILES = {16: Tile(16, 64, 16, 4, 2), 64: Tile(64, 64, 16, 8, 3)}


def tile_for(model: gpu.GpuModel, regime: str, tokens: int) -> Tile:
    if regime == "simple":
        return SIMPLE_TILES[16 if tokens <= 16 else 64]
    return (AMD_TILES if model.name.startswith("AMD") else TILES)[max(tokens, 16)]


class Kernels:
    """The launches behind gpu_product.Kernels."""

    backend = "triton"

    def model(self, device: torch.device) -> gpu.GpuModel:
        return gpu.triton().model(device)

    def has_tensor_kernels(self, model: gpu.GpuModel) -> bool:
        return model.capability >= MMA_SINCE

    def forward(self, regime: str, tokens: int, x: torch.Tensor, outputs: list[Output]) -> None:
        tile = tile_for(self.model(x.device), regime, tokens)
        for group in grouped(outputs, lambda o: (*kind_of(o.weight), o.bias is None, step_of(tile, o.s), o.split > 1)):
            _forward(tile, x, group)

    def backward(self, regime: str, tokens: int, split: int, gradients: list[Gradient], dx: torch.Tensor) -> None:
        """Launches that can't be one add up as further runs."""
        tile = tile_for(self.model(dx.device), regime, tokens)
        groups = list(grouped(gradients, lambda g: (*kind_of(g.weight), step_of(tile, g.t), g.dropout > 0)))
        if split * len(groups) == 1:
            _backward(tile, 1, groups[0], *dx.shape, dx)
            return
        sums = torch.empty(len(groups), split, *dx.shape, dtype=torch.float32, device=dx.device)
        for group, out in zip(groups, sums, strict=True):
            _backward(tile, split, group, *dx.shape, out)
        add_runs(sums.view(-1, *dx.shape), dx)

    def decode(self, weight: Weight, rows: range, columns: range, out: torch.Tensor) -> None:
        in_words = weight.suits_tensor_cores and columns.start % BLOCK == 0 and len(columns) % BLOCK == 0
        tile_rows = triton_decode.ROWS[in_words]
        grid = triton.cdiv(len(rows), tile_rows), triton.cdiv(len(columns), triton_decode.COLUMNS)
        gpu.triton().launch(
            triton_decode.nf4_linear_decode, grid, weight.packed, weight.absmax, weight.absmax_scale, weight.absmax_offset,
            *tables(weight), out, *block_bits([weight]), weight.k, rows.start, columns.start, len(rows), len(columns),
            IN_WORDS=in_words, ROWS=tile_rows, COLUMNS=triton_decode.COLUMNS, num_warps=triton_decode.WARPS, **EXACT,
        )  # fmt: skip


def _forward(tile: Tile, x: torch.Tensor, outputs: list[Output]) -> None:
    m, k = x.shape
    weights = [o.weight for o in outputs]
    sums = [torch.empty(o.split, *o.y.shape, dtype=torch.float32, device=x.device) if o.split > 1 else o.y for o in outputs]
    *firsts, programs = accumulate((triton.cdiv(o.weight.n, tile.rows) * o.split for o in outputs), initial=0)
    gpu.triton().launch(
        nf4_linear_forward, (triton.cdiv(m, tile.tokens), programs), x, x.stride(0), *constants(weights),
        tuple(o.bias for o in outputs), tuple(sums), tuple(o.s for o in outputs), tuple(o.b for o in outputs),
        tuple(rank(o.s) for o in outputs), tuple(float(o.scale) for o in outputs), tuple(w.n for w in weights),
        block_bits(weights), tuple(o.split for o in outputs), tuple(firsts), *tables(weights[0]), m, k,
        IN_WORDS=weights[0].suits_tensor_cores, TOKENS=tile.tokens, ROWS=tile.rows, DEPTH=tile.depth,
        STEP=step_of(tile, outputs[0].s), **tile.options,
    )  # fmt: skip
    for output, runs in zip(outputs, sums, strict=True):
        if output.split > 1:
            add_runs(runs, output.y)


def _backward(tile: Tile, split: int, gradients: list[Gradient], m: int, k: int, out: torch.Tensor) -> None:
    weights = [g.weight for g in gradients]
    *firsts, rounds = accumulate((triton.cdiv(w.n, tile.depth) for w in weights), initial=0)
    seeds = [(sealed(g.seed & 0xFFFFFFFF), sealed(g.seed >> 32)) for g in gradients]
    gpu.triton().launch(
        nf4_linear_backward, (triton.cdiv(m, tile.tokens), triton.cdiv(k, tile.rows) * split), tuple(g.dy for g in gradients),
        tuple(g.dy.stride(0) for g in gradients), *constants(weights), tuple(g.t for g in gradients),
        tuple(g.a for g in gradients), tuple(rank(g.t) for g in gradients),
        tuple(int(g.dropout * 2**32) for g in gradients), tuple(1 / (1 - g.dropout) for g in gradients),
        *zip(*seeds, strict=True), tuple(w.n for w in weights), block_bits(weights), tuple(firsts), *tables(weights[0]), out,
        rounds, split, m, k, IN_WORDS=weights[0].suits_tensor_cores, DROPOUT=gradients[0].dropout > 0, TOKENS=tile.tokens,
        COLUMNS=tile.rows, DEPTH=tile.depth, STEP=step_of(tile, gradients[0].t), **tile.options,
    )  # fmt: skip


def kind_of(weight: Weight) -> tuple[bool, str, bool]:
    """What the weights of one launch have in common."""
    return weight.suits_tensor_cores, weight.quant_type, weight.absmax_scale is None


def step_of(tile: Tile, thin: torch.Tensor | None) -> int:
    """Columns of s (m, r) or t a step: 16, or half a round's depth where r is more; 0 without a low-rank branch."""
    return 0 if thin is None else 16 if thin.shape[1] <= 16 else max(tile.depth // 2, 16)


def rank(thin: torch.Tensor | None) -> int:
    return 0 if thin is None else thin.shape[1]


def block_bits(weights: list[Weight]) -> tuple[int, ...]:
    return tuple(weight.block_size.bit_length() - 1 for weight in weights)


def constants(weights: list[Weight]) -> Iterator[tuple]:
    """packed, absmax, absmax_scale, absmax_offset: a tuple each."""
    for name in ("packed", "absmax", "absmax_scale", "absmax_offset"):
        yield tuple(getattr(weight, name) for weight in weights)


def tables(weight: Weight) -> tuple[torch.Tensor | None, torch.Tensor]:
    """values8 where the constants are double quantised, values4."""
    device = weight.packed.device
    return None if weight.absmax_scale is None else values8(True, device), values4(weight.quant_type, device)


def grouped(things: Iterable[One], key: Callable[[One], Hashable]) -> Iterator[list[One]]:
    """Lists of those with one key, in their order."""
    groups: dict[Hashable, list[One]] = {}
    for thing in things:
        groups.setdefault(key(thing), []).append(thing)
    yield from groups.values()


KERNELS = Kernels()
run, run_dx = partial(on_gpu.run, KERNELS), partial(on_gpu.run_dx, KERNELS)
run_many, run_many_dx = partial(on_gpu.run_many, KERNELS), partial(on_gpu.run_many_dx, KERNELS)
kernel, kernel_dx = partial(on_gpu.kernel, KERNELS), partial(on_gpu.kernel_dx, KERNELS)
