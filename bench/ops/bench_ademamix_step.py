"""`optimizer.step()` of AdEMAMix: 64 M fp32 parameters in one tensor, with moments in fp32 and in 8 bits. Error: of the first
step's change of the first parameter. bitsandbytes on a CPU is a row of torch's operations, in 8 bits after unpacking."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.goals import Goal
from bench.measure import Case
from bench.ops.bench_adamw_step import bitsandbytes, candidate, work
from peftk.optim import AdEMAMix, AdEMAMix8bit

OPTIONS = dict(lr=1e-3, betas=(0.9, 0.999, 0.9999), alpha=5.0, eps=1e-8, weight_decay=0.01)


def first_change(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """From moments of zero: the fast average is the gradient, the slow one its ten-thousandth."""
    mixed = 1 + OPTIONS["alpha"] * (1 - OPTIONS["betas"][2])
    return -OPTIONS["lr"] * (OPTIONS["weight_decay"] * param + mixed * grad / (grad.abs() + OPTIONS["eps"]))


def cases(size: int) -> Iterator[Case]:
    whole = [(4 * size, size)]
    for name, ours, theirs, state, ratio in (
        ("fp32", AdEMAMix, "AdEMAMix", 12, 2),
        ("8 bits", AdEMAMix8bit, "AdEMAMix8bit", 3, 15),
    ):
        candidates = [
            candidate("peftk", ours, whole, state, first_change, **OPTIONS),
            bitsandbytes(theirs, whole, state, first_change, **OPTIONS),
        ]
        yield Case(f"{4 * size}x{size}, {name}", work(whole, state), candidates, Goal("bitsandbytes", ratio))
