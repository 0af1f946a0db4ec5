"""`optimizer.step()` of Lion: 64 M fp32 parameters in one tensor, with the moment in fp32 and in 8 bits. Error: of the first
step's change of the first parameter. bitsandbytes on a CPU is a row of torch's operations, in 8 bits after unpacking."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.goals import Goal
from bench.measure import Case
from bench.ops.bench_adamw_step import bitsandbytes, candidate, work
from peftk.optim import Lion, Lion8bit

OPTIONS = dict(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)


def first_change(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """From a moment of zero it goes lr along the gradient's sign."""
    return -OPTIONS["lr"] * (OPTIONS["weight_decay"] * param + grad.sign())


def cases(size: int) -> Iterator[Case]:
    whole = [(4 * size, size)]
    for name, ours, theirs, state, ratio in (("fp32", Lion, "Lion", 4, 2), ("8 bits", Lion8bit, "Lion8bit", 1, 15)):
        candidates = [
            candidate("peftk", ours, whole, state, first_change, **OPTIONS),
            bitsandbytes(theirs, whole, state, first_change, **OPTIONS),
        ]
        yield Case(f"{4 * size}x{size}, {name}", work(whole, state), candidates, Goal("bitsandbytes", ratio))
