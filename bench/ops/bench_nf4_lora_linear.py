"""A QLoRA layer inside a model, forward and backward: y, dx, dA, dB; fp32 A and B, r = 16. Error: the largest of the four.

HF peft stands on bitsandbytes' Linear4bit and on a dense linear.
"""

from collections.abc import Iterator

import torch

from bench.goals import Goal
from bench.linear import NAMES, RANK, Layer, Step, training_candidates
from bench.measure import Case

ON_BITSANDBYTES, ON_DENSE = "HF peft on bitsandbytes", "HF peft on dense bf16"
ROWS = {16: (6, 1.8), 128: (2.2, 1.3), 512: (1.5, 1.25), 2048: (1.5, 1.4)}  # rows: times as fast as these two
DROPOUTS = (0.0, 0.05)
HEADLINE = "m=512, bf16"


def cases(size: int) -> Iterator[Case]:
    layer = Layer.random(size, size, torch.bfloat16)
    for dropout in DROPOUTS:
        for m, (on_bitsandbytes, on_dense) in ROWS.items():
            yield case(layer, m, dropout, (Goal(ON_BITSANDBYTES, on_bitsandbytes), Goal(ON_DENSE, on_dense)))
    layer = layer.in_dtype(torch.float32)
    for m in ROWS:
        yield case(layer, m, 0.0, (Goal(ON_BITSANDBYTES, 1),))


def case(layer: Layer, m: int, dropout: float, goals: tuple[Goal, ...]) -> Case:
    (n, k), dtype = layer.w4.shape, layer.dense.weight.dtype
    step = Step.random(m, n, k, dtype, dropout)
    name = f"m={m}, {NAMES[dtype]}, {n}x{k}, r={RANK}, dropout {dropout:g}, forward + backward"
    return Case(name, step.work(layer.w4.nbytes), training_candidates(layer, step), goals)
