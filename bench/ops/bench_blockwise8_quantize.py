"""Quantise to the dynamic 8-bit code, blocks of 256, as double quantisation and optimizer states have it. Error: of x decoded.

bitsandbytes' CPU kernel looks codes up by an approximation; its error shows it.
"""

from collections.abc import Iterator

import torch

from bench import peers
from bench.goals import Goal
from bench.measure import Candidate, Case, Work, relative_error
from peftk.ops import blockwise8_dequantize, blockwise8_quantize

GOAL = Goal("bitsandbytes", 1)
BLOCK = 256


def cases(size: int) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(size, size).mul_(torch.randn(size, 1).exp_()).to(dtype)
        truth = x.double()

        def error(codes: torch.Tensor, absmax: torch.Tensor, truth: torch.Tensor = truth) -> float:
            return relative_error(blockwise8_dequantize(codes, absmax, BLOCK), truth)

        yield Case(
            f"{size}x{size} {str(dtype).removeprefix('torch.')}",
            Work(read=x.nbytes, write=x.numel() + 4 * x.numel() // BLOCK),
            [
                Candidate("peftk", lambda x=x: blockwise8_quantize(x, BLOCK), lambda result, error=error: error(*result)),
                peers.candidate(
                    "bitsandbytes",
                    [peers.BITSANDBYTES],
                    lambda x=x: peers.bnb_quantize_blockwise(x, BLOCK),
                    lambda result, error=error: error(result[0], result[1].absmax),
                ),
            ],
            GOAL,
        )
