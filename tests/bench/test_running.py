"""bench/running.py: a bench that fails takes nobody's rows; one table at the end."""

from __future__ import annotations

import types
from dataclasses import replace

import pytest
import torch

from bench import report, running
from bench.catalogue import RedTests
from bench.goals import Verdict
from bench.limits import Limits
from bench.measure import Row

LIMITS = Limits(10e9, 5e9, 8e9, {torch.bfloat16: 100e9, torch.float32: 50e9})
HERE = report.Provenance("2026-01-02", "abc1234", "some-cpu-2cores", 2, "avx2", dict.fromkeys(report.PACKAGES, "1"))
OURS = Row("m=1", "peftk", 0.002, 0.003, 20, share=0.5, verdicts=(Verdict(">= 2x peer", "1.50x", False),), p10=0.001)
PEER = Row("m=1", "peer", 0.003, 0.004, 20, ratio=1.5, p10=0.0025)
ABSENT = Row("m=1", "other", note="not installed")


def bench(*cases: list[Row], fails: str = "") -> types.SimpleNamespace:
    def rows(size, repeat, limits):
        yield from cases
        if fails:
            raise ValueError(fails)

    return types.SimpleNamespace(rows=rows)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, types.SimpleNamespace]:
    found = {
        "good": bench([OURS, PEER, ABSENT]),
        "half": bench([OURS, PEER], fails="no memory"),
        "bad": bench(fails="never began"),
        "red": bench([OURS]),
        "last": bench([replace(OURS, case="m=2", extra=2_000_000, extra_spread=(1_500_000, 2_500_000))]),
    }
    monkeypatch.setattr(running, "module_of", found.__getitem__)

    class Tests:
        def demand(self, name: str) -> None:
            if name == "red":
                raise RedTests("tests are not green")

    monkeypatch.setattr(running, "Tests", Tests)
    return found


def test_one_that_fails_takes_no_others_rows(modules, capsys: pytest.CaptureFixture):
    done = running.run(list(modules), running.Settings(64, 1), LIMITS, HERE)
    assert done.rows == {
        "good": [OURS, PEER, ABSENT],
        "half": [OURS, PEER],
        "bad": [],
        "last": modules["last"].rows(0, 0, 0).__next__(),
    }
    assert done.failed == {"half": "ValueError: no memory", "bad": "ValueError: never began", "red": "tests are not green"}
    shown = capsys.readouterr()
    assert "Traceback" in shown.err and "== last" in shown.out
    table = running.summary(done).splitlines()
    assert table[1].split("  ")[0] == "good" and "2 ms" in table[1] and "1 to 3" in table[1] and "50%" in table[1]
    assert ">= 2x peer: missed" in table[1] and table[1].endswith("1.50x peer, other: not installed")
    assert any(line.startswith("last") and "2.0 MB" in line and "1.5 to 2.5" in line for line in table)
    assert table[-3:] == [
        "half: FAILED: ValueError: no memory",
        "bad: FAILED: ValueError: never began",
        "red: FAILED: tests are not green",
    ]


def test_rows_before_a_failure_are_recorded(modules, monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr(running.report, "record", lambda name, rows, *_: recorded.setdefault(name, list(rows)))
    monkeypatch.setattr(running.report, "rewrite_readme", lambda *_: None)
    recorded: dict[str, list[Row]] = {}
    running.run(["half", "bad", "red"], running.Settings(64, 1, record=True), LIMITS, HERE)
    assert recorded == {"half": [OURS, PEER]}


def test_lines_are_a_results_files(modules):
    done = running.run(["good"], running.Settings(64, 1), LIMITS, HERE)
    ours, *_ = done.lines(LIMITS, HERE)
    assert set(ours) == set(report.COLUMNS) and (ours["p10_ms"], ours["p50_ms"], ours["p90_ms"]) == ("1", "2", "3")
