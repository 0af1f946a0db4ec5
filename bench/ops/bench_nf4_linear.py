"""y = x W^T, forward, W in NF4. Truth: fp64 with W as it is stored; so a dense bf16 W has its rounding counted.

bf16: few rows with the weight in L3 (all weights but the dense one fit 32 MB), one row with every weight from memory (a model's
layers in turn), then the row counts of training. fp32 and fp16 x on the same weight. Last, widths that take the general path.
"""

from collections.abc import Iterator

import torch

from bench.goals import Goal, ShareGoal
from bench.linear import NAMES, Layer, forward_candidates, forward_work
from bench.measure import Case

PACKED, EITHER = "bitsandbytes packed", ("bitsandbytes", "bitsandbytes packed")
IN_L3 = {1: 1.8, 4: 1.1, 16: 1.1}  # rows: times as fast as bitsandbytes packed
CALLS = {1: 20, 4: 20, 16: 10}
LAYERS = 24  # in turn: 210 MB of 4-bit weights
ROWS = {32: 1.2, 64: 1.2, 128: 1.3, 512: 1.4, 2048: 1.2}  # rows: times as fast as the better of bitsandbytes' paths
NEAR_PEAK = (512, 2048)
OTHER_ROWS = {torch.float32: (1, 16, 128, 512), torch.float16: (1, 16, 512)}
GENERAL, GENERAL_ROWS = (8, 1), (1, 16, 128)  # added to k: blocks straddle rows; k is odd as well
HEADLINE = "m=512, bf16"


def cases(size: int) -> Iterator[Case]:
    layer = Layer.random(size, size, torch.bfloat16)
    for m, ratio in IN_L3.items():
        yield case([layer], m, (Goal(PACKED, ratio),), calls=CALLS[m])
    yield from_memory(size)
    for m, ratio in ROWS.items():
        near_peak = (ShareGoal(0.9, "bf16 peak"),) if m in NEAR_PEAK else ()
        yield case([layer], m, (Goal(EITHER, ratio), Goal("torch dense", 1), *near_peak))
    for dtype, rows in OTHER_ROWS.items():
        other = layer.in_dtype(dtype)
        for m in rows:
            dense = (Goal("torch dense", 1.8),) if (dtype, m) == (torch.float32, 512) else ()
            yield case([other], m, (Goal("bitsandbytes", 1), *dense), calls=CALLS.get(m, 1))
    for more in GENERAL:
        ragged = Layer.random(size, size + more, torch.bfloat16)
        for m in GENERAL_ROWS:
            yield case([ragged], m, (Goal("bitsandbytes", 1),), packed=False)


def from_memory(size: int) -> Case:
    """Dense weights are 4 times as large."""
    layers = [Layer.random(size, size, torch.bfloat16) for _ in range(LAYERS)]
    return case(layers, 1, (Goal(PACKED, 1.15), ShareGoal(0.9, "read bandwidth")))


def case(layers: list[Layer], m: int, goals: tuple[Goal | ShareGoal, ...], calls: int = 1, packed: bool = True) -> Case:
    """``layers`` in turn, one time each, for a figure of one; or one layer, ``calls`` times on end. ``packed``: with the peers
    that pack a weight anew, which general widths do not allow."""
    (n, k), dtype = layers[0].w4.shape, layers[0].dense.weight.dtype
    x = torch.randn(m, k).to(dtype)
    name = f"m={m}, {NAMES[dtype]}, {n}x{k}, forward"
    if len(layers) > 1:
        name += f", from memory ({len(layers)} layers in turn)"
    elif calls > 1:
        name += f", in L3 ({calls} calls on end)"
    work = forward_work(x, n, layers[0].w4.nbytes)
    candidates = forward_candidates(layers, x, int4=packed and dtype == torch.bfloat16, packed=packed)
    return Case(name, work, candidates, goals, calls, parts=len(layers))
