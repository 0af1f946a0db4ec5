"""y = x W^T for inference, bf16 x rounded to 8 bits, W in NF4, beside our own exact product. Truth: fp64 with x and W as stored.

So the error holds the rounding of x and of the table; every other row rounds less. torch's int4 rounds W to other values and is
held against those. All weights but the dense one fit a 32 MB L3.
"""

from collections.abc import Iterator

import torch

import peftk
from bench import peers
from bench.measure import Candidate, Case, Goal, Work, relative_error

GOAL = Goal("peftk nf4_linear", 1.5)
ROWS = (1, 4, 16, 128, 512)


def cases(size: int) -> Iterator[Case]:
    w4 = peftk.quantize_nf4(torch.randn(size, size).mul_(size**-0.5).bfloat16())
    dense = peers.dense_linear(w4, torch.bfloat16)
    stored = w4.dequantize(torch.float32)
    for m in ROWS:
        yield _case(m, w4, dense, stored)


def _case(m: int, w4: peftk.NF4Weight, dense: torch.nn.Linear, stored: torch.Tensor) -> Case:
    n, k = w4.shape
    x = torch.randn(m, k).bfloat16()
    truth = x.double() @ stored.double().T
    traffic = {"read": x.nbytes, "write": 2 * m * n, "flop": 2 * m * n * k}
    work = Work(**traffic | {"read": x.nbytes + w4.nbytes})
    work_dense = Work(**traffic | {"read": x.nbytes + dense.weight.nbytes})

    def error(result: torch.Tensor) -> float:
        return relative_error(result, truth)

    def int4() -> peers.Run:
        run, used = peers.torch_int4(stored, x)
        truths["int4"] = x.double() @ used.double().T
        return run

    truths: dict[str, torch.Tensor] = {}
    return Case(
        f"m={m}, {n}x{k} bf16, 8-bit activations",
        work,
        [
            Candidate("peftk", peers.no_grad(lambda: peftk.ops.nf4_linear_int8(x, w4)), error),
            Candidate("peftk nf4_linear", peers.no_grad(lambda: peftk.ops.nf4_linear(x, w4)), error),
            peers.candidate("bitsandbytes packed", [peers.BITSANDBYTES], lambda: peers.bnb_linear_packed(w4, x), error),
            Candidate("torch dense", peers.no_grad(lambda: dense(x)), error, work_dense),
            peers.candidate("torch int4", [], int4, lambda y: relative_error(y, truths["int4"])),
        ],
        GOAL,
    )
