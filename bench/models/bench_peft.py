"""A training step of SmolLM2-135M by HF peft, before and after: its own layers around ours, the fused ones, and on bitsandbytes.

The loop, batches and adapters of bench_smollm2: all three hold the same 4-bit weights, so the losses must be equal but for
rounding.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

import peftk
from bench import peers
from bench.goals import Goal
from bench.limits import Limits
from bench.measure import Candidate, Case, Row, Work, interleave, rows_of
from bench.models import bench_smollm2 as smollm2
from peftk.integrations import peft as integration

TESTS = ("tests/integrations/test_peft.py", "tests/ops/test_nf4_lora_linear.py")
FUSED, STOCK, ON_BITSANDBYTES = "HF peft on peftk", "HF peft on peftk, without the fused op", "HF peft on bitsandbytes"
GOALS = (Goal(STOCK, 1.0), Goal(ON_BITSANDBYTES, 1.2))


def rows(size: int, repeat: int, limits: Limits) -> Iterator[list[Row]]:
    """One case; ``size`` is the model's own. Prints the first losses."""
    everyone, losses = candidates(repeat + 2)
    present = [c for c in everyone if c.run is not None]
    times = dict(zip([c.who for c in present], interleave([c.run for c in present], repeat, budget=600.0), strict=True))
    print(smollm2.side_by_side(losses), end="\n\n")
    shape = f"SmolLM2-135M, {smollm2.SEQUENCES}x{smollm2.LENGTH} tokens, bf16, r={smollm2.RANK}, training step"
    yield rows_of(Case(shape, Work(0, 0), everyone, GOALS), limits, times, {})


def candidates(steps: int) -> tuple[list[Candidate], dict[str, list[float]]]:
    """Everyone with a run that does its next step, and the losses that they will have seen."""
    ids = smollm2.batches(steps)
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        peftk.save_adapter(smollm2.ours(), folder)

        def stepping(who: str, base: Callable[[], nn.Module]) -> peers.Run:
            step, seen = smollm2.plain_step(smollm2.with_hf_peft(base(), folder)), losses.setdefault(who, [])
            upcoming = itertools.cycle(ids)
            return lambda: seen.append(step(next(upcoming)))

        def stock() -> peers.Run:
            with _unregistered():
                return stepping(STOCK, smollm2.quantised)

        on_bitsandbytes = partial(smollm2.on_peers, partial(peers.bnb_linear, compute_dtype=torch.bfloat16))
        both = [peers.HF_PEFT, peers.BITSANDBYTES]
        everyone = [
            peers.candidate(FUSED, [peers.HF_PEFT], lambda: stepping(FUSED, smollm2.quantised)),
            peers.candidate(STOCK, [peers.HF_PEFT], stock),
            peers.candidate(ON_BITSANDBYTES, both, lambda: stepping(ON_BITSANDBYTES, on_bitsandbytes)),
        ]
    return everyone, losses


@contextmanager
def _unregistered() -> Iterator[None]:
    integration.unregister()
    try:
        yield
    finally:
        integration.register()
