"""What is predicted, beside what a process takes."""

from __future__ import annotations

import sys

import pytest

from bench import memory_plan
from peftk.native import native

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or native() is None, reason="the high-water mark is Linux's, the kernels' memory ours"
)
pytest.importorskip("transformers")

WITHIN = 0.05


def ratio(row: memory_plan.Row) -> float:
    predicted, measured = memory_plan.predicted(row).total, memory_plan.measured(row)
    print(f"{row}: predicted {predicted / 1e6:.1f} MB, measured {measured / 1e6:.1f}, {predicted / measured:.3f}")
    return predicted / measured


def test_smollm2():
    row = {"model": "smollm2-135m", "method": "qlora", "base": "nf4", "batch": 1, "length": 64, "checkpointing": False}
    assert abs(ratio(row) - 1) < WITHIN


@pytest.mark.full
@pytest.mark.parametrize("row", memory_plan.rows(), ids=lambda row: "-".join(map(str, row.values())))
def test_all(row: memory_plan.Row):
    assert abs(ratio(row) - 1) < WITHIN


@pytest.mark.full  # a process of its own, for an error
def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="KeyError: 'nonsense'"):
        memory_plan.measured({**memory_plan.rows()[0], "method": "nonsense"})
