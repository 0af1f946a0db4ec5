"""One step of AdamW on a group of tensors, with moments in fp32 or in 8 bits: the formula is __init__.py's.

In 8 bits a program holds ROWS blocks as (ROWS, 256): a block's absmax is a reduction over one axis, and the codes nearest to its
new moments are looked up by exponent and leading mantissa bits: code_tables.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl

from peftk.format.dynamic8 import STATE_BLOCK, zero_code8
from peftk.ops import gpu
from peftk.ops.adamw_step import code_tables
from peftk.ops.triton_words import EXACT, pick, row_absmax, sealed, unsealed

Tensors = Sequence[torch.Tensor]

# Tensors of a launch, with moments in fp32 and in 8 bits: where they are small, a launch of each costs more than its step. With
# twice as many, gfx942 and gfx1100 spill their addresses.
GROUP, GROUP8 = 8, 4
ALONE = 1 << 20  # elements from which on a tensor has a launch to itself
TILE, WARPS = 1024, 4  # elements a program with fp32 moments: 8 a thread
ROWS, WARPS8 = 16, 8  # blocks of 8-bit moments a program: 16 elements a thread

BLOCK = tl.constexpr(STATE_BLOCK)
ZERO1, ZERO2 = tl.constexpr(zero_code8(True)), tl.constexpr(zero_code8(False))
SHIFT1, SHIFT2 = tl.constexpr(code_tables.SIGNED.shift), tl.constexpr(code_tables.UNSIGNED.shift)
FIRST1, FIRST2 = tl.constexpr(code_tables.SIGNED.first), tl.constexpr(code_tables.UNSIGNED.first)
LOWEST1, LOWEST2 = tl.constexpr(2.0**code_tables.SIGNED.lowest), tl.constexpr(2.0**code_tables.UNSIGNED.lowest)
ROOM1, ROOM2 = tl.constexpr(code_tables.SIGNED.room), tl.constexpr(code_tables.UNSIGNED.room)


@triton.jit
def updated(param, grad, m, v, coefficients):
    """The new parameter and moments in fp32; each operation rounds by itself."""
    grad_factor, decay, weight1, beta2, weight2, step_size, root_factor, eps = coefficients
    g = grad.to(tl.float32) * grad_factor
    m = m + (g - m) * weight1
    v = v * beta2 + (g * weight2) * g
    denominator = tl.sqrt_rn(v) * root_factor + eps
    return param.to(tl.float32) * decay - tl.div_rn(m * step_size, denominator), m, v


@triton.jit
def _tile(param, grad, exp_avg, exp_avg_sq, coefficients, left, RAGGED: tl.constexpr, TILE: tl.constexpr):
    i = tl.arange(0, TILE)
    inside = i < left if RAGGED else None
    p, g = tl.load(param + i, mask=inside), tl.load(grad + i, mask=inside)
    p, m, v = updated(p, g, tl.load(exp_avg + i, mask=inside), tl.load(exp_avg_sq + i, mask=inside), coefficients)
    tl.store(param + i, p.to(param.dtype.element_ty), mask=inside)
    tl.store(exp_avg + i, m, mask=inside)
    tl.store(exp_avg_sq + i, v, mask=inside)


@triton.jit
def adamw_step(
    param,  # of each tensor, as all tuples: (count,) fp32, bf16 or fp16
    grad,  # the same
    exp_avg,  # (count,) fp32
    exp_avg_sq,  # (count,) fp32
    counts,  # elements, sealed
    firsts,  # program where it begins, sealed
    coefficients,  # coefficients.py
    TILE: tl.constexpr,  # elements a program
):
    which, first = located(firsts, TILE)
    left = unsealed(pick(counts, which)) - first
    p, g = pick(param, which) + first, pick(grad, which) + first
    m, v = pick(exp_avg, which) + first, pick(exp_avg_sq, which) + first
    if left >= TILE:
        _tile(p, g, m, v, coefficients, left, False, TILE)
    else:
        _tile(p, g, m, v, coefficients, left, True, TILE)


@triton.jit
def located(firsts, TILE: tl.constexpr):
    """The program's tensor, and its first element there."""
    program = tl.program_id(0).to(tl.int64)
    which, begin = 0, program * 0
    for i in tl.static_range(1, len(firsts)):
        there = program >= unsealed(firsts[i])
        which, begin = which + there.to(tl.int32), tl.where(there, unsealed(firsts[i]), begin)
    return which, (program - begin) * TILE


# ---- moments in 8 bits --------------------------------------------------------------------------------------------------------


@triton.jit
def decoded(codes, table, absmax):
    """codes (rows, BLOCK) uint8, absmax (rows,) -> fp32"""
    values = tl.gather(table, tl.reshape(codes.to(tl.int32), (codes.numel,)), 0)
    return tl.reshape(values, codes.shape) * absmax[:, None]


@triton.jit
def scaled(x):
    """x (rows, BLOCK) -> x / absmax in [-1, 1], absmax (rows,). A block with nothing above the denormals is zeros."""
    most = row_absmax(x)
    most = tl.where(most < 1.1754943508222875e-38, 0.0, most)
    reciprocal = tl.where(most == 0.0, 0.0, tl.div_rn(tl.full(most.shape, 1.0, tl.float32), most))
    return tl.reshape(x * reciprocal[:, None], (x.numel,)), most


@triton.jit
def nearest_unsigned(x, words):
    """x (n,) in [0, 1] -> codes (n,) int32. NaN gets any."""
    bits = tl.maximum(x, LOWEST2).to(tl.uint32, bitcast=True)
    word = tl.gather(words, (bits >> SHIFT2).to(tl.int32) - FIRST2, 0).to(tl.uint32, bitcast=True)
    return ((word + (bits << (24 - SHIFT2))) >> 24).to(tl.int32)


@triton.jit
def nearest_signed(x, words, least):
    """x (n,) in [-1, 1] -> codes (n,) int32; ``least``: the lowest value of the code, which has no -1. NaN gets any."""
    x = tl.maximum(x, least)
    bits = tl.maximum(tl.abs(x), LOWEST1).to(tl.uint32, bitcast=True)
    word = tl.gather(words, (bits >> SHIFT1).to(tl.int32) - FIRST1, 0).to(tl.uint32, bitcast=True)
    own = x.to(tl.uint32, bitcast=True)
    rank = ((word + ((bits << (24 - SHIFT1)) | (own >> (8 + SHIFT1)))) >> 24).to(tl.int32)
    return ZERO1 + tl.where(own >= 0x80000000, -rank, rank)


@triton.jit
def _tile8(
    param, grad, state1, state2, absmax1, absmax2, coefficients, tables, left, RAGGED: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = tl.arange(0, ROWS)
    i = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = i < left if RAGGED else None
    begun = row * BLOCK < left if RAGGED else None
    values1, values2 = tables, tables + 256
    table1 = tl.load(values1 + tl.arange(0, 256)).to(tl.float32, bitcast=True)
    table2 = tl.load(values2 + tl.arange(0, 256)).to(tl.float32, bitcast=True)
    codes1 = tl.load(state1 + i, mask=inside, other=ZERO1 if RAGGED else None)
    codes2 = tl.load(state2 + i, mask=inside, other=ZERO2 if RAGGED else None)
    m = decoded(codes1, table1, tl.load(absmax1 + row, mask=begun))
    v = decoded(codes2, table2, tl.load(absmax2 + row, mask=begun))
    p = tl.load(param + i, mask=inside, other=0.0 if RAGGED else None)
    g = tl.load(grad + i, mask=inside, other=0.0 if RAGGED else None)
    p, m, v = updated(p, g, m, v, coefficients)
    tl.store(param + i, p.to(param.dtype.element_ty), mask=inside)

    unit1, most1 = scaled(m)
    unit2, most2 = scaled(v)
    words1, words2 = tables + 512, tables + 512 + ROOM1
    least = tl.load(values1).to(tl.float32, bitcast=True)
    codes1 = nearest_signed(unit1, tl.load(words1 + tl.arange(0, ROOM1)), least)
    codes2 = nearest_unsigned(unit2, tl.load(words2 + tl.arange(0, ROOM2)))
    tl.store(state1 + i, tl.reshape(codes1, i.shape).to(tl.uint8), mask=inside)
    tl.store(state2 + i, tl.reshape(codes2, i.shape).to(tl.uint8), mask=inside)
    tl.store(absmax1 + row, most1, mask=begun)
    tl.store(absmax2 + row, most2, mask=begun)


@triton.jit
def adamw_step8(
    param,  # of each tensor, as all tuples: (count,) fp32, bf16 or fp16
    grad,  # the same
    state1,  # (count,) uint8
    state2,  # (count,) uint8
    absmax1,  # (ceil(count / BLOCK),) fp32
    absmax2,  # (ceil(count / BLOCK),) fp32
    counts,  # elements, sealed
    firsts,  # program where it begins, sealed
    coefficients,  # coefficients.py
    tables,  # code_tables.py
    ROWS: tl.constexpr,  # blocks a program
):
    which, first = located(firsts, ROWS * BLOCK)
    left = tl.minimum(unsealed(pick(counts, which)) - first, ROWS * BLOCK).to(tl.int32)
    p, g = pick(param, which) + first, pick(grad, which) + first
    codes1, codes2 = pick(state1, which) + first, pick(state2, which) + first
    scale1, scale2 = pick(absmax1, which) + first // BLOCK, pick(absmax2, which) + first // BLOCK
    if left == ROWS * BLOCK:
        _tile8(p, g, codes1, codes2, scale1, scale2, coefficients, tables, left, False, ROWS)
    else:
        _tile8(p, g, codes1, codes2, scale1, scale2, coefficients, tables, left, True, ROWS)


# ---- launches -----------------------------------------------------------------------------------------------------------------


def run(params: Tensors, grads: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, coefficients: Sequence[float]) -> None:
    for lists, grid, places in launches(GROUP, TILE, params, grads, exp_avg, exp_avg_sq):
        gpu.triton().launch(adamw_step, grid, *lists, *places, tuple(coefficients), TILE=TILE, num_warps=WARPS, **EXACT)


def run8(
    params: Tensors,
    grads: Tensors,
    state1: Tensors,
    state2: Tensors,
    absmax1: Tensors,
    absmax2: Tensors,
    coefficients: Sequence[float],
) -> None:
    tables = code_tables.code_tables(params[0].device)
    for lists, grid, places in launches(GROUP8, ROWS * STATE_BLOCK, params, grads, state1, state2, absmax1, absmax2):
        gpu.triton().launch(adamw_step8, grid, *lists, *places, tuple(coefficients), tables, ROWS=ROWS, num_warps=WARPS8, **EXACT)


def launches(most: int, tile: int, *lists: Tensors) -> Iterator[tuple[list[tuple], tuple[int], tuple[tuple, tuple]]]:
    """Of each launch, of ``most`` tensors: the lists' tensors, its grid, counts and firsts. Large tensors have one to themselves,
    since a group's programs look for theirs; so have those that no wide access takes, each of which may be another kernel."""
    small: list[tuple] = []
    for tensors in zip(*lists, strict=True):
        count = tensors[0].numel()
        if count >= ALONE or any(t.data_ptr() % 16 for t in tensors):
            yield launch_of(1, tile, [tensors])
        elif count:
            small.append(tensors)
    for at in range(0, len(small), most):
        group = small[at : at + most]
        yield launch_of(most if len(group) > 1 else 1, tile, group)


def launch_of(size: int, tile: int, group: list[tuple]) -> tuple[list[tuple], tuple[int], tuple[tuple, tuple]]:
    """Filled up to ``size`` with what no program comes to: groups of every size would be kernels of their own."""
    counts = [tensors[0].numel() for tensors in group]
    *firsts, programs = accumulate((triton.cdiv(count, tile) for count in counts), initial=0)
    missing = size - len(group)
    group, counts, firsts = group + group[-1:] * missing, counts + [0] * missing, firsts + [programs] * missing
    return list(zip(*group, strict=True)), (programs,), (tuple(map(sealed, counts)), tuple(map(sealed, firsts)))
