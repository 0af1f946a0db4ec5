"""A QLoRA layer inside a model, forward and backward: y, dx, dA, dB; fp32 A and B, r = 16. Error: the largest of the four.

HF peft stands on bitsandbytes' Linear4bit and on a dense linear. Layers that share x: one call with a list against a call each.
"""

from collections.abc import Iterator

import torch

from bench.goals import Goal
from bench.linear import NAMES, RANK, SEPARATE, Layer, Step, shared_candidates, training_candidates
from bench.measure import Case, Work

ON_BITSANDBYTES, ON_DENSE = "HF peft on bitsandbytes", "HF peft on dense bf16"
ROWS = {16: (6, 1.8), 128: (2.2, 1.3), 512: (1.5, 1.25), 2048: (1.5, 1.4)}  # rows: times as fast as these two
DROPOUTS = (0.0, 0.05)
SHARED = {"q, k, v": (1, 1 / 4, 1 / 4), "gate, up": (2.6875, 2.6875)}  # n of each in units of k: 4096, 1024; 11008
SHARED_ROWS = 128
HEADLINE = "m=512, bf16"


def cases(size: int) -> Iterator[Case]:
    layer = Layer.random(size, size, torch.bfloat16)
    for dropout in DROPOUTS:
        for m, (on_bitsandbytes, on_dense) in ROWS.items():
            yield case(layer, m, dropout, (Goal(ON_BITSANDBYTES, on_bitsandbytes), Goal(ON_DENSE, on_dense)))
    layer = layer.in_dtype(torch.float32)
    for m in ROWS:
        yield case(layer, m, 0.0, (Goal(ON_BITSANDBYTES, 1),))
    for what, parts in SHARED.items():
        layers = [Layer.random(round(size * part), size, torch.bfloat16) for part in parts]
        for backward in (False, True):
            yield shared_case(what, layers, SHARED_ROWS, backward)


def case(layer: Layer, m: int, dropout: float, goals: tuple[Goal, ...]) -> Case:
    (n, k), dtype = layer.w4.shape, layer.dense.weight.dtype
    step = Step.random(m, n, k, dtype, dropout)
    name = f"m={m}, {NAMES[dtype]}, {n}x{k}, r={RANK}, dropout {dropout:g}, forward + backward"
    return Case(name, step.work(layer.w4.nbytes), training_candidates(layer, step), goals)


def shared_case(what: str, layers: list[Layer], m: int, backward: bool) -> Case:
    """Layers of one k in one call."""
    k, dtype = layers[0].w4.shape[1], torch.bfloat16
    steps = [Step.random(m, layer.w4.shape[0], k, dtype) for layer in layers]
    sizes = ", ".join(f"{layer.w4.shape[0]}" for layer in layers)
    name = f"{what}: m={m}, {NAMES[dtype]}, {k} -> {sizes}, r={RANK}, {'forward + backward' if backward else 'forward'}"
    return Case(name, shared_work(layers, steps, backward), shared_candidates(layers, steps, backward), Goal(SEPARATE, 1))


def shared_work(layers: list[Layer], steps: list[Step], backward: bool) -> Work:
    """x is read and dx written once; the rest as in a step of each layer, or in its forward."""
    x, adapters = steps[0].x, sum(step.A.nbytes + step.B.nbytes for step in steps)
    weights, outputs = sum(layer.w4.nbytes for layer in layers), sum(step.dy.nbytes for step in steps)
    if backward:
        flop = sum(step.work(layer.w4.nbytes).flop for step, layer in zip(steps, layers, strict=True))
        return Work(x.nbytes + outputs + 2 * (weights + adapters), x.nbytes + outputs + adapters, flop)
    m, k = x.shape
    forward = sum(2 * m * (layer.w4.shape[0] * k + RANK * (layer.w4.shape[0] + k)) for layer in layers)
    return Work(x.nbytes + weights + adapters, outputs, forward)
