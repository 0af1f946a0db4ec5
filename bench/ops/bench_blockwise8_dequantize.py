"""Decode the dynamic 8-bit code to fp32, blocks of 256, into a fresh tensor."""

from collections.abc import Iterator

import torch

from bench import peers
from bench.goals import Goal
from bench.measure import Candidate, Case, Work, relative_error
from peftk.format.dynamic8 import values8
from peftk.ops import blockwise8_dequantize, blockwise8_quantize

GOAL = Goal("bitsandbytes", 1)
BLOCK = 256


def cases(size: int) -> Iterator[Case]:
    x = torch.randn(size, size).mul_(torch.randn(size, 1).exp_())
    codes, absmax = blockwise8_quantize(x, BLOCK)
    truth = values8()[codes.long()].double()
    truth.view(-1, BLOCK).mul_(absmax.double()[:, None])

    def error(result: torch.Tensor) -> float:
        return relative_error(result, truth)

    yield Case(
        f"{size}x{size} to fp32, fresh result",
        Work(read=codes.nbytes + absmax.nbytes, write=x.nbytes),
        [
            Candidate("peftk", lambda: blockwise8_dequantize(codes, absmax, BLOCK), error),
            peers.candidate(
                "bitsandbytes", [peers.BITSANDBYTES], lambda: peers.bnb_dequantize_blockwise(codes, absmax, BLOCK), error
            ),
        ],
        GOAL,
    )
