"""bench/layers/bench_distributed.py and bench/collectives.py; tests/planner/test_traffic.py counts in processes."""

from __future__ import annotations

import pytest
import torch

from bench.collectives import Collectives
from bench.layers import bench_distributed as bench
from bench.limits import Limits
from peftk.planner import Plan
from peftk.planner.step import WEIGHTS4

LIMITS = Limits(1, 1, 1, {})


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch):
    """Processes that hold their part of 8000 bytes under fully_shard, and all of them otherwise; a peer that has no tp."""
    asked = []

    def processes(who: str, engine: str, ranks: int, size: int) -> list[dict]:
        asked.append((who, engine, ranks))
        if engine == "tp" and who != bench.OURS:
            raise bench.Failed("NotImplementedError: only nn.Linear")
        held = 8000 // ranks if engine == "fsdp" else 8000
        return [{"held": {WEIGHTS4: held - r}, "peak": 9 + r, "collectives": {"all-reduce": 100}} for r in range(ranks)]

    monkeypatch.setattr(bench, "processes", processes)
    plan = Plan({WEIGHTS4: 2000, "logits": 5}, "loss", {}, collectives={"all-reduce": 100}, gpus=4)
    monkeypatch.setattr(bench, "planned", lambda engine, ranks, size: plan)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: name)
    return asked


def test_rows(counted: list):
    alone, *others = bench.rows(4096, 1, LIMITS, (1, 4))
    assert [row.extra for row in alone] == [8000, 8000] and len(others) == 6
    ddp, sharded, parallel = others[::2]
    assert [verdict.met for verdict in ddp[0].verdicts] == [False]  # the plan says 2000
    assert [verdict.met for verdict in sharded[0].verdicts] == [True, True] and not sharded[1].verdicts
    assert sharded[0].extra == 2000 and "peak 0.0" in sharded[0].note
    assert parallel[1].extra is None and parallel[1].note == "can't run: NotImplementedError: only nn.Linear"
    traffic = others[3][0]
    assert traffic.extra == 2 * 100 * 3 // 4 and traffic.verdicts[0].met and "all-reduce 0.000 MB" in traffic.note
    assert len({row.case for rows in (alone, *others) for row in rows}) == 7


def test_ours_must_run(monkeypatch: pytest.MonkeyPatch, counted: list):
    def fail(*facts: object) -> list[dict]:
        raise bench.Failed("ValueError: odd")

    monkeypatch.setattr(bench, "processes", fail)
    with pytest.raises(RuntimeError, match="fully_shard, 2 processes: ValueError: odd"):
        bench.count(bench.OURS, "fsdp", 2, 512)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert bench.count(bench.ON_BITSANDBYTES, "fsdp", 2, 512).why_not == "bitsandbytes not installed"


def test_collectives_that_are_not_known_are_told():
    counter, tensor = Collectives(), torch.zeros(4)
    counter._enter("c10d::broadcast_", [tensor.int()], None)
    counter._enter("c10d::allreduce_", [tensor, tensor], None)
    assert counter.bytes == {"all-reduce": 32}
    with pytest.raises(RuntimeError, match="c10d::scatter_: a collective whose bytes aren't counted"):
        counter._enter("c10d::scatter_", [tensor], None)


@pytest.mark.full
def test_real_processes():
    pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    rows = [row for rows in bench.rows(1024, 1, LIMITS, (1, 2)) for row in rows]
    ours = [row for row in rows if row.who == bench.OURS]
    assert len(ours) == 7 and all(verdict.met for row in ours for verdict in row.verdicts)
    theirs = {row.case.split(",")[0] + row.case.split(",")[1]: row for row in rows if row.who != bench.OURS}
    assert "NotImplementedError" in theirs["memory a process tensor parallel"].note
    sharded = [row for row in rows if row.case.startswith("memory a process, fully_shard")]
    assert sharded[0].extra < sharded[1].extra  # whose constants stay whole


@pytest.mark.full
def test_a_process_that_fails_says_why():
    with pytest.raises(bench.Failed, match="^[A-Za-z]*Error: "):
        bench.processes("nobody", "nothing", 1, 64)
