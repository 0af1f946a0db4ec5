"""Code that uses bitsandbytes, before and after peftk takes over, in one process: a 4-bit layer in eval mode and in training,
quantising, AdamW8bit, and a QLoRA step of the real SmolLM2-135M with HF peft.

Both sides run the same code, each on layers of its own, since bitsandbytes alone rewrites a weight in eval mode; what switches
is peftk.integrations.bitsandbytes.enable and disable, before the clock starts.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import peftk
from bench import peers
from bench.goals import Goal
from bench.limits import Limits
from bench.linear import Layer, forward_work
from bench.measure import Candidate, Case, Row, Work, error_of, interleave, relative_error, rows_of
from bench.models import bench_smollm2 as smollm2
from peftk.integrations import bitsandbytes as backend

TESTS = (
    "tests/integrations/test_bitsandbytes.py",
    "tests/integrations/test_bitsandbytes_ops.py",
    "tests/integrations/test_bitsandbytes_models.py",
)
WITH, WITHOUT = "bitsandbytes on peftk", "bitsandbytes"
HEADLINE = "QLoRA step"
NO_SLOWER, STEP = Goal(WITHOUT, 1), Goal(WITHOUT, 1.2)
ROWS = 512  # of x in training

Error = Callable[[Any], float]
Both = Callable[[], tuple[peers.Run, Error | None]]  # makes one side: its run, and how far the result is from fp64


def rows(size: int, repeat: int, limits: Limits) -> Iterator[list[Row]]:
    """``size``: n and k of the layers."""
    for case in (eval_forward, training, quantizing, optimizer_step):
        yield measured(*case(size), limits, repeat)
    yield measured(*qlora_step(repeat + 2), limits, repeat, budget=600.0)


def measured(name: str, work: Work, goal: Goal, make: Both, limits: Limits, repeat: int, budget: float = 30.0) -> list[Row]:
    """``make`` is called for each side, and its run timed with the side in force."""
    switches = {WITH: backend.enable, WITHOUT: backend.disable}
    candidates, errors = [], {}
    try:
        for who, switch in switches.items():
            switch()
            candidates.append(Candidate(who, *make()))
        case = Case(name, work, candidates, goal)
        for candidate in candidates:
            switches[candidate.who]()
            errors[candidate.who] = error_of(case, candidate)
        times = interleave(
            [c.run for c in candidates], repeat, budget, prepare=lambda i: switches[candidates[i].who](), warm_up=False
        )
    finally:
        backend.disable()
    return rows_of(case, limits, {c.who: seconds for c, seconds in zip(candidates, times, strict=True)}, errors)


def eval_forward(size: int) -> tuple[str, Work, Goal, Both]:
    layer, x = Layer.random(size, size, torch.bfloat16), torch.randn(1, size).bfloat16()
    truth = x.double() @ layer.stored().double().T

    def make() -> tuple[peers.Run, Error]:
        linear = peers.bnb_linear(layer.w4, x.dtype).eval()
        return peers.no_grad(lambda: linear(x)), lambda y: relative_error(y, truth)

    return f"Linear4bit in eval mode, m=1, bf16, {size}x{size}", forward_work(x, size, layer.w4.nbytes), NO_SLOWER, make


def training(size: int) -> tuple[str, Work, Goal, Both]:
    layer, x = Layer.random(size, size, torch.bfloat16), torch.randn(ROWS, size).bfloat16().requires_grad_()
    dy = torch.randn(ROWS, size).bfloat16()
    truth = dy.double() @ layer.stored().double()

    def make() -> tuple[peers.Run, Error]:
        linear = peers.bnb_linear(layer.w4, x.dtype)
        return lambda: torch.autograd.grad(linear(x), x, dy)[0], lambda dx: relative_error(dx, truth)

    once = forward_work(x, size, layer.w4.nbytes)
    work = Work(2 * once.read, 2 * once.write, 2 * once.flop)
    return f"Linear4bit in training, forward + backward, m={ROWS}, bf16, {size}x{size}", work, NO_SLOWER, make


def quantizing(size: int) -> tuple[str, Work, Goal, Both]:
    w = torch.randn(size, size).bfloat16()

    def make() -> tuple[peers.Run, Error]:
        error = lambda made: relative_error(peers.bnb_as_nf4_weight(*made).dequantize(torch.float32), w.double())  # noqa: E731
        return peers.bnb_quantize_4bit(w), error

    return f"quantize_4bit, nested, {size}x{size} bf16", Work(w.nbytes, w.numel() // 2), NO_SLOWER, make


def optimizer_step(size: int) -> tuple[str, Work, Goal, Both]:
    def make() -> tuple[peers.Run, None]:
        import bitsandbytes

        p = torch.nn.Parameter(torch.randn(size, size))
        p.grad = torch.randn(size, size)
        return bitsandbytes.optim.AdamW8bit([p], lr=1e-3, weight_decay=0.01).step, None

    count = size * size
    return f"AdamW8bit.step, {size}x{size} fp32", Work(10 * count, 6 * count), NO_SLOWER, make


def qlora_step(steps: int) -> tuple[str, Work, Goal, Both]:
    """HF peft's LoRA on Linear4bit, AdamW8bit; from the same adapters."""
    ids = smollm2.batches(steps)

    def make() -> tuple[peers.Run, None]:
        import bitsandbytes

        model, upcoming = on_bitsandbytes(), itertools.cycle(ids)
        step = smollm2.plain_step(model, bitsandbytes.optim.AdamW8bit)
        return lambda: step(next(upcoming)), None

    shape = f"SmolLM2-135M, {smollm2.SEQUENCES}x{smollm2.LENGTH} tokens, bf16, r={smollm2.RANK}, HF peft, AdamW8bit"
    return f"{HEADLINE}, {shape}", Work(0, 0), STEP, make


def on_bitsandbytes() -> torch.nn.Module:
    """The model on Linear4bit with HF peft's adapters around it, alike each time."""
    model = smollm2.ours()
    with tempfile.TemporaryDirectory() as folder:
        peftk.save_adapter(model, folder)
        linear = partial(peers.bnb_linear, compute_dtype=torch.bfloat16)
        return smollm2.with_hf_peft(smollm2.on_peers(linear), folder)
