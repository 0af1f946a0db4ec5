"""A QLoRA layer inside a model, forward and backward: y, dx, dA, dB; bf16 x, fp32 A and B, r = 16. Error: the largest.

HF peft stands on bitsandbytes' Linear4bit and on a dense bf16 linear. With dropout every peer draws a mask of its own, so only
ours, whose mask is known, is held against fp64.
"""

from collections.abc import Iterator

import torch

import peftk
from bench import peers
from bench.measure import Candidate, Case, Goal, Work, relative_error

GOAL = Goal("HF peft on bitsandbytes", 1)
ROWS_AND_DROPOUT = ((16, 0.0), (128, 0.0), (512, 0.0), (512, 0.05))
RANK, SCALE, SEED = 16, 2.0, 7


def cases(size: int) -> Iterator[Case]:
    w4 = peftk.quantize_nf4(torch.randn(size, size).mul_(size**-0.5).bfloat16())
    dense = peers.dense_linear(w4, torch.bfloat16)
    for m, dropout in ROWS_AND_DROPOUT:
        yield _case(m, dropout, w4, dense)


def _case(m: int, dropout: float, w4: peftk.NF4Weight, dense: torch.nn.Linear) -> Case:
    n, k = w4.shape
    x, dy = torch.randn(m, k).bfloat16(), torch.randn(m, n).bfloat16()
    A, B = torch.randn(RANK, k).mul_(k**-0.5).requires_grad_(), torch.randn(n, RANK).mul_(RANK**-0.5).requires_grad_()
    truth = _truth(x, dy, w4, A, B, dropout)
    flop = 4 * m * n * k + 6 * m * RANK * (n + k)
    low_rank = x.nbytes + dy.nbytes + 2 * (A.nbytes + B.nbytes)
    work = Work(low_rank + 2 * w4.nbytes, 2 * m * (n + k) + A.nbytes + B.nbytes, flop)
    work_dense = Work(low_rank + 2 * dense.weight.nbytes, work.write, flop)

    def error(results: tuple[torch.Tensor, ...]) -> float:
        return max(relative_error(result, t) for result, t in zip(results, truth, strict=True))

    def ours(x: torch.Tensor) -> torch.Tensor:
        return peftk.ops.nf4_lora_linear(x, w4, A, B, SCALE, dropout=dropout, seed=SEED)

    def hf(base: torch.nn.Module) -> peers.Run:
        layer, *parameters = peers.hf_lora(base, A, B, SCALE, dropout)
        return peers.forward_backward(layer, x, *parameters, dy)

    packages = [peers.HF_PEFT, peers.BITSANDBYTES]
    known = None if dropout else error
    return Case(
        f"m={m}, {n}x{k} bf16, r={RANK}, dropout {dropout:g}, forward + backward",
        work,
        [
            Candidate("peftk", peers.forward_backward(ours, x, A, B, dy), error),
            peers.candidate("HF peft on bitsandbytes", packages, lambda: hf(peers.bnb_linear(w4, x.dtype)), known),
            peers.candidate("HF peft on dense bf16", packages[:1], lambda: hf(dense), known, work_dense),
        ],
        GOAL,
    )


def _truth(x, dy, w4, A, B, dropout) -> tuple[torch.Tensor, ...]:
    """y, dx, dA, dB in fp64 with W as it is stored."""
    x, A, B = (t.detach().double().requires_grad_() for t in (x, A, B))
    with peftk.use("reference"):  # the implementation that takes fp64
        branch = peftk.ops.philox_dropout(x, dropout, SEED) if dropout else x
        y = x @ w4.dequantize(torch.float32).double().T + SCALE * (branch @ A.T @ B.T)
        return (y.detach(), *torch.autograd.grad(y, (x, A, B), dy.double()))
