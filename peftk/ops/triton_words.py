"""Words for Triton kernels; they know no op. Only triton_*.py files import this: Triton need not be there otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from peftk.ops.philox_dropout import reference

# For every launch: a product is rounded before the sum that follows it, as in the reference; no contraction into an FMA.
EXACT = {"enable_fp_fusion": False}

ROUNDS = tl.constexpr(reference.ROUNDS)
FACTOR_0, FACTOR_1 = map(tl.constexpr, reference.FACTORS)
KEY_STEP_0, KEY_STEP_1 = map(tl.constexpr, reference.KEY_STEPS)


@triton.jit
def pick(choices, which):
    """choices[which] of a tuple of pointers or numbers; None where all of them are."""
    chosen = choices[0]
    if chosen is not None:
        for i in tl.static_range(1, len(choices)):
            chosen = tl.where(which == i, choices[i], chosen)
    return chosen


@triton.jit
def locate(number, firsts):
    """The part that ``number`` falls into and its place there; ``firsts``: where the parts begin, the first at 0."""
    which = 0
    for i in tl.static_range(1, len(firsts)):
        which += (number >= firsts[i]).to(tl.int32)
    return which, number - pick(firsts, which)


@triton.jit
def unsealed(number):
    """What ``sealed`` made of a number, int64."""
    return (number - (1 << 34)) >> 1


@triton.jit
def row_absmax(x):
    """x (rows, columns) fp32 -> (rows,) max |x|. As integers, where NaN > Inf > every number: fp32's maximum drops a NaN."""
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def unit_rows(x, absmax):
    """x * (1 / absmax) by rows; a row of zeros stays zeros. div_rn: `/` on fp32 is div.full, which isn't correctly rounded."""
    one = tl.full(absmax.shape, 1.0, tl.float32)
    return x * tl.where(absmax == 0.0, 0.0, tl.div_rn(one, absmax))[:, None]


@triton.jit
def count_below(x, heap, LEVELS: tl.constexpr):
    """x (n,) -> how many of the 2^LEVELS - 1 thresholds lie strictly below; 0 for NaN. heap: (2^LEVELS,) as in_heap_order has it,
    so that a warp's look-ups of one level lie side by side: sorted thresholds are strides of 2^k apart, in one bank."""
    node = tl.full(x.shape, 1, tl.int32)
    for _ in tl.static_range(LEVELS):
        node = 2 * node + (x > tl.gather(heap, node, 0)).to(tl.int32)
    return node - (1 << LEVELS)


@triton.jit
def philox(counter, seed):
    """Counters (int64, any shape) -> the four words of each, uint32. By 64-bit products, an instruction each: tl.philox
    makes their halves by two, and dropout of 8 elements takes 201 instructions on sm_80 instead of 169."""
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = tl.zeros(counter.shape, tl.uint32), tl.zeros(counter.shape, tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        p0, p1 = c0.to(tl.uint64) * FACTOR_0, c2.to(tl.uint64) * FACTOR_1
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0, k1 = k0 + KEY_STEP_0, k1 + KEY_STEP_1
    return c0, c1, c2, c3


@triton.jit
def keeps(element, drop_below, seed):
    """Whether dropout (philox_dropout) keeps the elements of these flat int64 indices; drop_below: p * 2^32 as uint32. A counter
    an element: four neighbours make the same one."""
    w0, w1, w2, w3 = philox(element >> 2, seed)
    word = tl.where((element & 2) != 0, tl.where((element & 1) != 0, w3, w2), tl.where((element & 1) != 0, w1, w0))
    return word >= drop_below


@triton.jit
def keeps_fours(counter, drop_below, seed):
    """As keeps, for elements 4 * counter … 4 * counter + 3: (rows, n) int64 -> (rows, 4 * n). Through bits of one word, which the
    compiler removes: four words joined make Triton move them between threads (shrink_kernel: 20 instructions an element
    instead of 17.5)."""
    w0, w1, w2, w3 = philox(counter, seed)
    bits = (w0 >= drop_below).to(tl.int32) | ((w1 >= drop_below).to(tl.int32) << 1)
    bits |= ((w2 >= drop_below).to(tl.int32) << 2) | ((w3 >= drop_below).to(tl.int32) << 3)
    keep = (bits[:, :, None] >> tl.arange(0, 4)[None, None, :]) & 1
    return tl.reshape(keep != 0, (counter.shape[0], 4 * counter.shape[1]))


@triton.jit
def keeps_tile(row, first, c, drop_below, seed, COLUMNS: tl.constexpr, FOURS: tl.constexpr):
    """As keeps, for these rows (int64) and columns first … first + COLUMNS - 1 of a matrix with c columns. FOURS: c and first are
    multiples of 4."""
    if FOURS:
        return keeps_fours(row[:, None] * (c // 4) + (first // 4 + tl.arange(0, COLUMNS // 4))[None, :], drop_below, seed)
    return keeps(row[:, None] * c + (first + tl.arange(0, COLUMNS))[None, :], drop_below, seed)


def sealed(number: int) -> int:
    """A number below 2^61 as one that is always an int64, odd and not 1: inside a tuple, where do_not_specialize doesn't reach,
    what Triton compiles would depend on it."""
    return (1 << 34) + 2 * number + 1


def in_heap_order(thresholds: Sequence[float]) -> list[float]:
    """2^levels - 1 ascending numbers as a binary tree: the root at 1, the children of i at 2i and 2i + 1; 0 is unused."""
    leaves = len(thresholds) + 1
    nodes = [(node, node.bit_length() - 1) for node in range(1, leaves)]
    return [0.0, *(thresholds[(2 * (node - (1 << level)) + 1) * (leaves >> level + 1) - 1] for node, level in nodes)]


def blocks_touched(tile: int, block_size: int) -> int:
    """How many blocks the ``tile`` elements of one program may lie in, rounded up to a power of two."""
    if tile % block_size == 0 or block_size % tile == 0:
        return max(tile // block_size, 1)
    return triton.next_power_of_2((tile - 2) // block_size + 2)
