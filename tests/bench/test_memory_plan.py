"""What is predicted, beside what a process takes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import memory_plan, report
from peftk.native import native
from peftk.planner import Plan

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or native() is None, reason="the high-water mark is Linux's, the kernels' memory ours"
)
pytest.importorskip("transformers")


def ratio(row: memory_plan.Row) -> float:
    predicted, measured = memory_plan.predicted(row).total, memory_plan.measured(row)
    print(f"{row}: predicted {predicted / 1e6:.1f} MB, measured {measured / 1e6:.1f}, {predicted / measured:.3f}")
    return predicted / measured


def test_smollm2():
    row = {"model": "smollm2-135m", "method": "qlora", "base": "nf4", "batch": 1, "length": 64, "checkpointing": False}
    assert abs(ratio(row) - 1) < memory_plan.WITHIN


@pytest.mark.full
@pytest.mark.parametrize("row", memory_plan.rows(), ids=lambda row: "-".join(map(str, row.values())))
def test_all(row: memory_plan.Row):
    assert abs(ratio(row) - 1) < memory_plan.WITHIN


@pytest.mark.full  # a process of its own, for an error
def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="KeyError: 'nonsense'"):
        memory_plan.measured({**memory_plan.rows()[0], "method": "nonsense"})


def test_rows_come_back_the_newest_of_each_case(tmp_path: Path):
    case = memory_plan.row("smollm2-135m", "lora", "dense", 1, 64, True)
    here = report.Provenance("2026-01-02", "abc1234", "some-cpu", 1, "avx2", dict.fromkeys(report.PACKAGES, "1"))
    plan = Plan({"weights, dense": 90, "adapters": 10}, "loss", {})
    for malloc, found in ((memory_plan.GIVEN_BACK, 200), (memory_plan.FINETUNE, 150), (memory_plan.GIVEN_BACK, 104)):
        memory_plan.record(memory_plan.finished(case, malloc, plan, found, here), tmp_path / "plan.csv")
    first, second = memory_plan.read(tmp_path / "plan.csv")
    assert (first["malloc"], first["measured"], first["met"], first["largest"]) == ("given back", "104", "met", "weights, dense")
    assert (second["malloc"], second["ratio"], second["met"]) == ("finetune", "0.6667", "missed")
    assert first["goal"] == "within 5% of the peak" and first["machine"] == "some-cpu" and first["checkpointing"] == "True"
