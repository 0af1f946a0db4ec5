"""Quantise W to NF4 with double quantisation. Error: of W decoded again, so that of 4 bits; equal errors mean equal codes."""

from collections.abc import Iterator

import torch

import peftk
from bench import peers
from bench.goals import Goal
from bench.measure import Candidate, Case, Work, relative_error

GOAL = Goal("bitsandbytes", 40)


def cases(size: int) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        w = torch.randn(size, size).mul_(torch.randn(size, 1).exp_()).to(dtype)
        truth = w.double()

        def error(w4: peftk.NF4Weight, truth: torch.Tensor = truth) -> float:
            return relative_error(w4.dequantize(torch.float32), truth)

        yield Case(
            f"{size}x{size} {str(dtype).removeprefix('torch.')}, double quantised",
            Work(read=w.nbytes, write=peftk.quantize_nf4(w).nbytes),
            [
                Candidate("peftk", lambda w=w: peftk.quantize_nf4(w), error),
                peers.candidate(
                    "bitsandbytes",
                    [peers.BITSANDBYTES],
                    lambda w=w: peers.bnb_quantize_4bit(w),
                    lambda result, error=error: error(peers.bnb_as_nf4_weight(*result)),
                ),
            ],
            GOAL,
        )
