"""The products beside W: S = D(z) A^T and T = scale dy B (shrink), dA = T^T D(z) and dB = scale dy^T S (outer).

shrink: out (m, r) = scale * D(wide) factor, wide (m, c). outer: out (r, c) = scale * thin^T D(wide). D is dropout.
Memory is the bound: a program reads its tiles of the wide matrix once for up to 128 ranks. Where the shape has too few tiles to
fill a GPU, the contracted dimension is cut into runs, whose fp32 sums a second kernel adds in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from peftk.ops import gpu
from peftk.ops.gpu_product import Outer, Shrink
from peftk.ops.triton_words import EXACT, keeps_tile

MMA_SINCE = (8, 0)  # compute capability; Triton's dot is made of FMAs before, and of fp32 on every GPU
STAGES = 3  # where tensor cores multiply
MOST_RANKS = 128  # of a program
# Terms that FMAs add one after the other. Of fp32 sums of 64, 200 and 1024 none is twice as far from fp64 as torch's; with 64 a
# tenth is where there are few of them, and one chain of 4096 is 4 times as far.
CHAIN = 16
PROGRAMS = 2  # a multiprocessor, that runs are made for
LEAST_ROUNDS, MOST_RUNS = 4, 32  # of a run; of a product
SUMS, SUM_WARPS, TOGETHER = 256, 4, 8  # elements a program that adds runs; runs it loads at a time


@triton.jit
def _dropped(wide, row, first, c, drop_below, seed, DROPOUT: tl.constexpr, COLUMNS: tl.constexpr, FOURS: tl.constexpr):
    """D of a tile but for its factor 1 / (1 - p), which is in scale."""
    if DROPOUT:
        wide = tl.where(keeps_tile(row, first, c, drop_below, seed, COLUMNS, FOURS), wide, 0.0)
    return wide


@triton.jit
def _folded(total, sums, terms, CHAIN: tl.constexpr):
    """Begins another chain of sums after every CHAIN terms."""
    if CHAIN:
        if terms % CHAIN == 0:
            total += sums
            sums = tl.zeros_like(sums)
    return total, sums


@triton.jit(do_not_specialize=["wide_stride", "factor_stride", "m", "c", "r", "run", "scale", "drop_below", "seed"])
def shrink_kernel(
    wide,  # (m, c)
    factor,  # (c, r), neighbours along r where BY_RANK, else along c
    out,  # (m, r), or fp32 sums of runs (runs, m, r)
    wide_stride: tl.int64,  # UNITs from row to row
    factor_stride: tl.int64,  # from neighbours to neighbours: RANK_UNITs where BY_RANK, else UNITs
    m: tl.int64,
    c: tl.int64,  # in UNITs
    r: tl.int64,  # in RANK_UNITs
    run: tl.int64,  # columns of a program, in COLUMNS
    scale: tl.float32,
    drop_below: tl.uint32,  # p * 2^32
    seed: tl.int64,
    DROPOUT: tl.constexpr,
    BY_RANK: tl.constexpr,
    UNIT: tl.constexpr,  # elements; known here, accesses are that wide
    RANK_UNIT: tl.constexpr,  # elements
    ROWS: tl.constexpr,  # of a program
    COLUMNS: tl.constexpr,  # a round
    RANKS: tl.constexpr,  # of a program
    CHAIN: tl.constexpr,  # terms added one after the other, 0: all
):
    wide_stride, c, r = wide_stride * UNIT, c * UNIT, r * RANK_UNIT
    if BY_RANK:
        along_c, along_r = factor_stride * RANK_UNIT, 1
    else:
        along_c, along_r = 1, factor_stride * UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = tl.minimum(row, m - 1)  # rows beyond the last are read as the last, and not written
    rank = tl.program_id(2).to(tl.int64) * RANKS + tl.arange(0, RANKS)
    column = tl.arange(0, COLUMNS)
    first = tl.program_id(1) * run * COLUMNS
    left = tl.minimum(c - first, run * COLUMNS)
    wide_tile = wide + here[:, None] * wide_stride + (first + column)[None, :]
    factor_tile = factor + (first + column)[:, None] * along_c + rank[None, :] * along_r
    sums = tl.zeros((ROWS, RANKS), tl.float32)
    total = sums
    for at in range(0, left, COLUMNS):
        inside = at + column < left
        x = tl.load(wide_tile, mask=inside[None, :], other=0.0)
        f = tl.load(factor_tile, mask=inside[:, None] & (rank < r)[None, :], other=0.0)
        x = _dropped(x, here, first + at, c, drop_below, seed, DROPOUT, COLUMNS, UNIT >= 4)
        sums = tl.dot(x, f, sums, input_precision="ieee")
        total, sums = _folded(total, sums, at + COLUMNS, CHAIN)
        wide_tile += COLUMNS
        factor_tile += COLUMNS * along_c
    if CHAIN:
        sums += total
    target = out + (tl.program_id(1) * m + row)[:, None] * r + rank[None, :]
    tl.store(target, (sums * scale).to(out.dtype.element_ty), mask=(row < m)[:, None] & (rank < r)[None, :])


@triton.jit(do_not_specialize=["wide_stride", "m", "c", "r", "run", "drop_below", "seed"])
def outer_kernel(
    thin,  # (m, r)
    wide,  # (m, c)
    out,  # (runs, r, c) fp32, without scale: what direct stores of all strides and dtypes save isn't worth their kernels
    wide_stride: tl.int64,  # UNITs from row to row
    m: tl.int64,
    c: tl.int64,  # in UNITs
    r: tl.int64,  # in RANK_UNITs
    run: tl.int64,  # rows of a program, in ROWS
    drop_below: tl.uint32,  # p * 2^32
    seed: tl.int64,
    DROPOUT: tl.constexpr,
    UNIT: tl.constexpr,  # elements; known here, accesses are that wide
    RANK_UNIT: tl.constexpr,  # elements
    ROWS: tl.constexpr,  # a round
    COLUMNS: tl.constexpr,  # of a program
    RANKS: tl.constexpr,  # of a program
    CHAIN: tl.constexpr,  # terms added one after the other, 0: all
):
    wide_stride, c, r = wide_stride * UNIT, c * UNIT, r * RANK_UNIT
    row = tl.arange(0, ROWS)
    first = tl.program_id(1) * run * ROWS
    left = tl.minimum(m - first, run * ROWS)
    rank = tl.program_id(2).to(tl.int64) * RANKS + tl.arange(0, RANKS)
    first_column = tl.program_id(0).to(tl.int64) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    thin_tile = thin + (first + row)[:, None] * r + rank[None, :]
    wide_tile = wide + (first + row)[:, None] * wide_stride + column[None, :]
    sums = tl.zeros((RANKS, COLUMNS), tl.float32)
    total = sums
    for at in range(0, left, ROWS):
        inside = at + row < left
        t = tl.load(thin_tile, mask=inside[:, None] & (rank < r)[None, :], other=0.0)
        x = tl.load(wide_tile, mask=inside[:, None] & (column < c)[None, :], other=0.0)
        x = _dropped(x, first + at + row, first_column, c, drop_below, seed, DROPOUT, COLUMNS, UNIT >= 4)
        sums = tl.dot(tl.trans(t), x, sums, input_precision="ieee")
        total, sums = _folded(total, sums, at + ROWS, CHAIN)
        thin_tile += ROWS * r
        wide_tile += ROWS * wide_stride
    if CHAIN:
        sums += total
    target = out + (tl.program_id(1) * r + rank)[:, None] * c + column[None, :]
    tl.store(target, sums, mask=(rank < r)[:, None] & (column < c)[None, :])


@triton.jit(do_not_specialize=["columns", "runs"])
def add_runs_kernel(
    partial,  # (runs, rows, columns) fp32
    out,  # (rows, columns)
    out_row,
    out_column,
    columns: tl.int64,
    runs: tl.int32,
    scale: tl.float32,
    SUMS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * SUMS + tl.arange(0, SUMS)
    inside, at = column < columns, partial + row * columns + column
    sums = tl.zeros((SUMS,), tl.float32)
    for first in range(0, runs, TOGETHER):
        for run in tl.static_range(TOGETHER):
            sums += tl.load(at, mask=inside & (first + run < runs), other=0.0)
            at += tl.num_programs(1) * columns
    tl.store(out + row * out_row + column * out_column, (sums * scale).to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Tile:
    """rows and columns of the wide matrix, one of them a program, the other a round."""

    rows: int
    columns: int
    ranks: int  # of a program
    warps: int
    mma: bool

    @property
    def options(self) -> dict[str, int | bool]:
        sizes = {"ROWS": self.rows, "COLUMNS": self.columns, "RANKS": self.ranks, "CHAIN": 0 if self.mma else CHAIN}
        return {**sizes, "num_warps": self.warps, "num_stages": STAGES if self.mma else 1, **EXACT}


def shrink(products: list[Shrink]) -> None:
    """Each out = scale * D(wide) factor."""
    for p in products:
        if p.out.numel():
            _shrink(p)


def outer(products: list[Outer]) -> None:
    """Each out = scale * thin^T D(wide)."""
    for p in products:
        if p.out.numel():
            _outer(p)


def _shrink(p: Shrink) -> None:
    (m, c), r, wide_stride = p.wide.shape, p.out.shape[1], p.wide.stride(0)
    factor = p.factor if 1 in p.factor.stride() else p.factor.contiguous()
    by_rank = factor.stride(0) != 1
    factor_stride = factor.stride(0 if by_rank else 1)
    unit = unit_of(c, wide_stride) if by_rank else unit_of(c, wide_stride, factor_stride)
    rank_unit = unit_of(r, factor_stride) if by_rank else unit_of(r)
    tile = shrink_tile(p.wide, r, p.dropout > 0 and unit < FOUR)
    row_tiles, rank_tiles = triton.cdiv(m, tile.rows), triton.cdiv(r, tile.ranks)
    run, runs = runs_of(triton.cdiv(c, tile.columns), row_tiles * rank_tiles, p.wide.device)
    scale, drop_below = facts_of(p)
    out = p.out if runs == 1 else torch.empty(runs, m, r, dtype=torch.float32, device=p.out.device)
    gpu.triton().launch(
        shrink_kernel, (row_tiles, runs, rank_tiles), p.wide, factor, out, wide_stride // unit,
        factor_stride // (rank_unit if by_rank else unit), m, c // unit, r // rank_unit, run, scale if runs == 1 else 1.0,
        drop_below, p.seed, DROPOUT=p.dropout > 0, BY_RANK=by_rank, UNIT=unit, RANK_UNIT=rank_unit, **tile.options,
    )  # fmt: skip
    if runs > 1:
        _add_runs(out, p.out, (1, m * r), (0, 1), scale)


def _outer(p: Outer) -> None:
    (m, c), r, wide_stride = p.wide.shape, p.thin.shape[1], p.wide.stride(0)
    unit, rank_unit = unit_of(c, wide_stride), unit_of(r)
    tile = outer_tile(p.wide, r, p.dropout > 0 and unit < FOUR)
    column_tiles, rank_tiles = triton.cdiv(c, tile.columns), triton.cdiv(r, tile.ranks)
    run, runs = runs_of(triton.cdiv(m, tile.rows), column_tiles * rank_tiles, p.wide.device)
    scale, drop_below = facts_of(p)
    sums = torch.empty(runs, r, c, dtype=torch.float32, device=p.out.device)
    gpu.triton().launch(
        outer_kernel, (column_tiles, runs, rank_tiles), p.thin, p.wide, sums, wide_stride // unit, m, c // unit, r // rank_unit,
        run, drop_below, p.seed, DROPOUT=p.dropout > 0, UNIT=unit, RANK_UNIT=rank_unit, **tile.options,
    )  # fmt: skip
    _add_runs(sums, p.out, (r, c), p.out.stride(), scale)


def _add_runs(partial: torch.Tensor, out: torch.Tensor, shape: tuple[int, int], strides: tuple[int, int], scale: float) -> None:
    """partial (runs, *shape) -> out (shape) with these strides."""
    rows, columns = shape
    gpu.triton().launch(
        add_runs_kernel, (triton.cdiv(columns, SUMS), rows), partial, out, *strides, columns, partial.shape[0], scale,
        SUMS=SUMS, TOGETHER=TOGETHER, num_warps=SUM_WARPS, **EXACT,
    )  # fmt: skip


FOUR = 4  # columns that share a Philox counter, where rows and tiles start at multiples of it


def unit_of(*sizes: int) -> int:
    """The largest of 8, 4 and 1 that divides them: a kernel that gets it as a constant, and sizes in it, knows what's aligned."""
    return next(unit for unit in (8, FOUR, 1) if all(size % unit == 0 for size in sizes))


def facts_of(p: Shrink | Outer) -> tuple[float, int]:
    """scale with dropout's own factor in it, and p * 2^32."""
    return p.scale / (1 - p.dropout), int(p.dropout * 2**32)


def runs_of(rounds: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """How many of its rounds a program does, and so how many runs there are. The shape and the GPU decide, nothing else."""
    wanted = min(MOST_RUNS, triton.cdiv(PROGRAMS * gpu.triton().model(device).multiprocessors, tiles))
    run = max(LEAST_ROUNDS, triton.cdiv(rounds, wanted))
    return run, max(1, triton.cdiv(rounds, run))


def has_mma(wide: torch.Tensor) -> bool:
    return wide.dtype != torch.float32 and gpu.triton().model(wide.device).capability >= MMA_SINCE


# Counted in cubins, not timed. On sm_80 (bf16, 16 ranks) 64 x 64 takes 56 registers and 2.9 instructions an element, 64 x 128 80
# and 2.2 with room for half as many blocks; 128 ranks and dropout at 128 x 64 spill on gfx1100. FMAs, and a Philox counter an
# element, leave registers for 16 columns (outer: rows) a round; stages beside FMAs spill on gfx1100.


def shrink_tile(wide: torch.Tensor, r: int, counter_an_element: bool) -> Tile:
    ranks, mma = ranks_of(r), has_mma(wide)
    columns = 16 if counter_an_element or not mma else 64 if ranks <= 64 else 32
    if wide.shape[0] <= 16:  # a warp a tile: more would share a row's columns, or wait
        return Tile(16, columns, ranks, max(1, ranks // 32), mma)
    rows = 64 if ranks <= 32 else 128 if mma else 32
    return Tile(rows, columns, ranks, 4 if ranks <= 32 else 8, mma)


def outer_tile(wide: torch.Tensor, r: int, counter_an_element: bool) -> Tile:
    ranks, mma = ranks_of(r), has_mma(wide)
    rows, columns = (32, 128) if mma and not counter_an_element else (16, 64 if mma or ranks <= 64 else 32)
    return Tile(rows, columns, ranks, 4 if ranks <= 32 else 8, mma)


def ranks_of(r: int) -> int:
    """A power of two that the dot takes."""
    return min(max(16, triton.next_power_of_2(r)), MOST_RANKS)
