"""What a call costs before any work is done: a 64x64 layer, one row, no gradients; as a function and as a module."""

from collections.abc import Iterator

import torch

import peftk
from bench import peers
from bench.goals import TimeGoal
from bench.linear import Layer, forward_work
from bench.measure import Candidate, Case, relative_error

TESTS = ("tests/ops/test_nf4_linear.py", "tests/nn/test_nf4_linear.py")
SIDE, CALLS = 64, 1000
GOALS = (TimeGoal(10e-6),)
HEADLINE = "function"


def cases(size: int) -> Iterator[Case]:
    """``size`` is not asked: the layer is small on purpose."""
    layer = Layer.random(SIDE, SIDE, torch.bfloat16)
    x = torch.randn(1, SIDE).bfloat16()
    work = forward_work(x, SIDE, layer.w4.nbytes)
    truth = x.double() @ layer.stored().double().T
    module = peftk.nn.NF4Linear.from_linear(layer.dense)
    bitsandbytes = [peers.BITSANDBYTES]

    def error(result: torch.Tensor) -> float:
        return relative_error(result, truth)

    def bnb_module() -> peers.Run:
        linear = peers.bnb_linear(layer.w4, x.dtype)
        return peers.no_grad(lambda: linear(x))

    def bnb_function() -> peers.Run:
        from bitsandbytes import matmul_4bit

        weight = peers.bnb_weight(layer.w4)
        return peers.no_grad(lambda: matmul_4bit(x, weight, quant_state=weight.quant_state))

    protocol = f"m=1, bf16, {SIDE}x{SIDE}, no gradients, {CALLS} calls on end"
    yield Case(
        f"function, {protocol}",
        work,
        [
            Candidate("peftk", peers.no_grad(lambda: peftk.ops.nf4_linear(x, layer.w4)), error),
            peers.candidate("bitsandbytes", bitsandbytes, bnb_function, error),
            Candidate("torch dense", peers.no_grad(lambda: torch.nn.functional.linear(x, layer.dense.weight)), error),
        ],
        GOALS,
        CALLS,
    )
    yield Case(
        f"module, {protocol}",
        work,
        [
            Candidate("peftk", peers.no_grad(lambda: module(x)), error),
            peers.candidate("bitsandbytes", bitsandbytes, bnb_module, error),
            peers.candidate("bitsandbytes packed", bitsandbytes, lambda: peers.bnb_linear_packed(layer.w4, x), error),
            Candidate("torch dense", peers.no_grad(lambda: layer.dense(x)), error),
        ],
        GOALS,
        CALLS,
    )
