"""Two threads against one, m = 512, bf16: forward, and forward + backward with LoRA, by everyone in one process.

torch.set_num_threads reaches bitsandbytes where both share one OpenMP runtime, as they do with torch 2.13.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from bench.goals import Goal
from bench.linear import RANK, Layer, Step, forward_candidates, forward_work, training_candidates
from bench.measure import Candidate, Case

TESTS = ("tests/ops/test_nf4_linear.py", "tests/ops/test_nf4_lora_linear.py")
ROWS, CALLS = 512, 3
GOALS = (Goal("peftk, 1 thread", 1.85),)
HEADLINE = "m=512"


def cases(size: int) -> Iterator[Case]:
    layer = Layer.random(size, size, torch.bfloat16)
    x = torch.randn(ROWS, size).bfloat16()
    name, calls = f"m={ROWS}, bf16, {size}x{size}", f"{CALLS} calls on end"
    forward = two_and_one(forward_candidates([layer], x, int4=False))
    yield Case(f"{name}, forward, {calls}", forward_work(x, size, layer.w4.nbytes), forward, GOALS, CALLS)
    step = Step.random(ROWS, size, size, torch.bfloat16)
    training = two_and_one(training_candidates(layer, step))
    yield Case(f"{name}, r={RANK}, forward + backward, {calls}", step.work(layer.w4.nbytes), training, GOALS, CALLS)


def two_and_one(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Each with two threads, and after them each with one. The limits of the run are those of all its threads."""
    return [
        *(replace(c, threads=2) for c in candidates),
        *(replace(c, who=f"{c.who}, 1 thread", threads=1) for c in candidates),
    ]
