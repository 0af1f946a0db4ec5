"""y = x W^T for inference, bf16 x rounded to 8 bits, W in NF4, beside our own exact product and the peers of bench_nf4_linear.

Truth: fp64 with x and W as they are stored, so the rounding of x and of the table counts. Arithmetic is held against the bf16
peak, which integers may pass.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

import peftk
from bench import peers
from bench.goals import Goal
from bench.linear import Layer, forward_candidates, forward_work, in_turn
from bench.measure import Candidate, Case, relative_error

EXACT = "peftk nf4_linear"
ROWS = {1: 1.2, 4: 1.4, 16: 1.6, 128: 1.6, 512: 1.6}  # rows: times as fast as the exact product
CALLS = {1: 20, 4: 20, 16: 10}
LAYERS = 24  # in turn: 210 MB of 4-bit weights
HEADLINE = "m=16, bf16"


def cases(size: int) -> Iterator[Case]:
    layer = Layer.random(size, size, torch.bfloat16)
    for m, ratio in ROWS.items():
        yield case([layer], m, ratio, CALLS.get(m, 1))
    yield case([Layer.random(size, size, torch.bfloat16) for _ in range(LAYERS)], 1, 1.0)


def case(layers: list[Layer], m: int, ratio: float, calls: int = 1) -> Case:
    """``layers`` in turn, one time each, for a figure of one; or one layer, ``calls`` times on end."""
    n, k = layers[0].w4.shape
    x = torch.randn(m, k).bfloat16()
    exact, *others = forward_candidates(layers, x)
    truths = [x.double() @ layer.stored().double().T for layer in layers]

    def ours(layer: Layer) -> peers.Run:
        return peers.no_grad(lambda: peftk.ops.nf4_linear_int8(x, layer.w4))

    def error(result: torch.Tensor | list[torch.Tensor]) -> float:
        results = [result] if isinstance(result, torch.Tensor) else result
        return max(relative_error(y, truth) for y, truth in zip(results, truths, strict=True))

    name = f"m={m}, bf16, {n}x{k}, 8-bit activations"
    if len(layers) > 1:
        name += f", from memory ({len(layers)} layers in turn)"
    elif calls > 1:
        name += f", in L3 ({calls} calls on end)"
    candidates = [Candidate("peftk", in_turn([ours(layer) for layer in layers]), error), replace(exact, who=EXACT), *others]
    return Case(name, forward_work(x, n, layers[0].w4.nbytes), candidates, (Goal(EXACT, ratio),), calls, parts=len(layers))
