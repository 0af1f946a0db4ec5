"""Dropout from a counter-based generator, p = 0.05, bf16. Error: over the kept elements, against x / (1 - p) in fp64.

torch draws from a sequential generator and writes its mask out; ours is a function of (seed, index) and is never stored.
"""

from collections.abc import Iterator

import torch

from bench.goals import Goal
from bench.measure import Candidate, Case, Work, relative_error
from peftk.ops import philox_dropout

GOAL = Goal("torch dropout", 1)
P, SEED = 0.05, 7


def cases(size: int) -> Iterator[Case]:
    x = torch.randn(size, size).bfloat16()
    scaled = x.double() / (1 - P)

    def error(result: torch.Tensor) -> float:
        return relative_error(result, scaled * (result != 0))

    yield Case(
        f"{size}x{size} bf16, p {P:g}",
        Work(read=x.nbytes, write=x.nbytes),
        [
            Candidate("peftk", lambda: philox_dropout(x, P, SEED), error),
            Candidate("torch dropout", lambda: torch.nn.functional.dropout(x, P, training=True), error),
        ],
        GOAL,
    )
