"""A LoRA layer on a dense bf16 weight inside a model, forward and backward: y, dx, dA, dB; bf16 x, fp32 A and B, r = 16.

Error: the largest. Both multiply twice by W, and HF peft reaches 86 % of one core's peak at m=512 (Zen 4), which leaves 1.17x at
most there. With dropout HF peft draws a mask of its own, so only ours, whose mask is known, is held against fp64.
"""

from collections.abc import Iterator

import torch

import peftk
from bench import peers
from bench.measure import Candidate, Case, Goal, Work, relative_error

GOAL = Goal("HF peft on dense bf16", 1.2)
ROWS_AND_DROPOUT = ((1, 0.0), (16, 0.0), (128, 0.0), (512, 0.0), (512, 0.05))
RANK, SCALE, SEED = 16, 2.0, 7
HEADLINE = "m=512"


def cases(size: int) -> Iterator[Case]:
    w = torch.randn(size, size).mul_(size**-0.5).bfloat16()
    for m, dropout in ROWS_AND_DROPOUT:
        yield _case(m, dropout, w)


def _case(m: int, dropout: float, w: torch.Tensor) -> Case:
    n, k = w.shape
    x, dy = torch.randn(m, k).bfloat16(), torch.randn(m, n).bfloat16()
    A, B = torch.randn(RANK, k).mul_(k**-0.5).requires_grad_(), torch.randn(n, RANK).mul_(RANK**-0.5).requires_grad_()
    truth = _truth(x, dy, w, A, B, dropout)
    factors = A.nbytes + B.nbytes
    work = Work(
        x.nbytes + dy.nbytes + 2 * (factors + w.nbytes), 2 * m * (n + k) + factors, 4 * m * n * k + 6 * m * RANK * (n + k)
    )

    def error(results: tuple[torch.Tensor, ...]) -> float:
        return max(relative_error(result, t) for result, t in zip(results, truth, strict=True))

    def ours(x: torch.Tensor) -> torch.Tensor:
        return peftk.ops.lora_linear(x, w, A, B, SCALE, dropout=dropout, seed=SEED)

    def hf() -> peers.Run:
        base = torch.nn.Linear(k, n, bias=False, device="meta")
        base.weight = torch.nn.Parameter(w, requires_grad=False)
        layer, *parameters = peers.hf_lora(base, A, B, SCALE, dropout)
        return peers.forward_backward(layer, x, *parameters, dy)

    return Case(
        f"m={m}, {n}x{k} bf16, r={RANK}, dropout {dropout:g}, forward + backward",
        work,
        [
            Candidate("peftk", peers.forward_backward(ours, x, A, B, dy), error),
            peers.candidate("HF peft on dense bf16", [peers.HF_PEFT], hf, None if dropout else error),
        ],
        GOAL,
    )


def _truth(x, dy, w, A, B, dropout) -> tuple[torch.Tensor, ...]:
    """y, dx, dA, dB in fp64."""
    x, A, B = (t.detach().double().requires_grad_() for t in (x, A, B))
    with peftk.use("reference"):  # the implementation that takes fp64
        branch = peftk.ops.philox_dropout(x, dropout, SEED) if dropout else x
        y = x @ w.double().T + SCALE * (branch @ A.T @ B.T)
        return (y.detach(), *torch.autograd.grad(y, (x, A, B), dy.double()))
