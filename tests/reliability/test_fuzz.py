"""The covering sample of ``python -m tests.reliability.fuzz``: some damaged files of each format in this process, and that the
fuzzer notices what it is there for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from tests.reliability import child, fuzz
from tests.reliability.child import REFUSED, TAKEN, case, outcome
from tests.reliability.formats import FORMATS, Format, holds

HAS_LIMITS = os.path.exists("/proc/self/statm")
pytestmark = pytest.mark.skipif(not HAS_LIMITS, reason="limits of address space are Linux's")
BY_NAME = {format.name: format for format in FORMATS}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_damaged_file_is_refused_by_name_or_is_what_it_says(name, tmp_path):
    format = BY_NAME[name]
    samples = format.samples()
    for sample in samples:
        assert outcome(format, sample, tmp_path / "case") == (TAKEN, "")
    found = set()
    for number in range(30):
        kind, told = outcome(format, case(format, samples, 0, number), tmp_path / "case")
        assert kind in (REFUSED, TAKEN), f"--format {name} --case {number}: {kind}\n{told}"
        found.add(kind)
    assert REFUSED in found


@pytest.mark.full
@pytest.mark.parametrize("name", ["prompt", "gguf", "quantised", "bitsandbytes", "whisper_ct2", "generate"])
def test_the_same_of_formats_that_make_a_model(name, tmp_path):
    format = child.formats()[name]
    samples = format.samples()
    for number in range(60):
        kind, told = outcome(format, case(format, samples, 0, number), tmp_path / "case")
        assert kind in (REFUSED, TAKEN), f"--format {name} --case {number}: {kind}\n{told}"


def _loops() -> None:
    until = time.process_time() + 60
    while time.process_time() < until:
        pass


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (lambda: {}["missing"], "KeyError"),
        (lambda: holds(False, "another tensor"), "WrongState"),
        (lambda: torch.empty(1 << 40, dtype=torch.uint8), "allocation"),
        (lambda: bytearray(1 << 40), "MemoryError"),
        (lambda: (_ for _ in ()).throw(ValueError("")), "refused without a word"),
        (_loops, "hang"),
    ],
    ids=["wrong error", "inconsistent", "torch's memory", "memory", "no message", "hang"],
)
def test_a_planted_fault_is_found(fault, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(child, "SECONDS", 0.3)
    format = Format("planted", 1, lambda: [{"a.json": b"{}"}], lambda _: fault(), lambda *_: None)
    assert outcome(format, {"a.json": b"{}"}, tmp_path / "case")[0] == kind


SAME = """
import hashlib, sys
sys.path[:0] = [".", "tests"]
from tests.reliability.child import case
from tests.reliability.formats import FORMATS
told = hashlib.sha256()
for format in (one for one in FORMATS if one.name in ("nf4_weight", "optimizer", "adapter")):
    samples = format.samples()
    for number in range(60):
        for name, content in sorted(case(format, samples, 0, number).items()):
            told.update(name.encode() + content)
print(told.hexdigest())
"""


def test_a_case_is_the_same_in_every_process():
    """Else ``--case`` shows another one than the one that failed."""
    told = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", SAME], cwd=fuzz.ROOT, env=environment, capture_output=True, text=True, check=True
        )
        told.add(done.stdout.split()[-1])
        time.sleep(2)  # the resolution of a zip's times
    assert len(told) == 1


def test_cases_differ():
    format = BY_NAME["records"]
    samples = format.samples()
    assert len({json.dumps(str(case(format, samples, 7, n))) for n in range(20)}) > 10


class FakeChild:
    """Dies at case 3, the first time it is asked for it, and is silent at case 5."""

    samples: list[str] = []

    def __init__(self, name: str, seed: int):
        pass

    def run(self, start: int, stop: int):
        for number in range(start, stop):
            if number == 3:
                raise EOFError("dead, exit status -11")
            if number == 5:
                raise TimeoutError("silent")
            yield number, REFUSED, 0.01, ""

    def end(self) -> None:
        pass


def test_a_dead_process_is_a_case_that_failed_and_a_stopped_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "Child", FakeChild)
    monkeypatch.setattr(fuzz, "CHUNK", 4)
    monkeypatch.setattr(fuzz, "shares", lambda count, names=None: {"records": count})
    log = fuzz.Log(tmp_path / "log.jsonl")
    tally = fuzz.run(10, 0, log, progress=False)["records"]
    assert tally.counts == {REFUSED: 8, "crash": 1, "hang": 1} and [number for number, *_ in tally.failures] == [3, 5]
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    (tmp_path / "log.jsonl").write_text("\n".join(lines[:2]) + "\n")
    again = fuzz.Log(tmp_path / "log.jsonl")
    assert again.tallies["records"].cases == 8
    assert fuzz.run(10, 0, again, progress=False)["records"].cases == 10


def test_the_result_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "RESULTS", tmp_path / "fuzz.csv")
    monkeypatch.setattr(fuzz, "commit", lambda: "abc1234")
    tally = fuzz.Tally()
    fuzz.add(tally, (0, REFUSED, 0.25, ""))
    fuzz.add(tally, (1, "hang", 9.0, "..."))
    fuzz.record({"records": tally}, 5)
    header, row, whole = (tmp_path / "fuzz.csv").read_text().splitlines()
    assert header == ",".join(fuzz.COLUMNS) and row.endswith(",5,records,2,1,0,1,9.0") and whole.endswith(",all,2,1,0,1,9.0")
    assert ",abc1234," in row


@pytest.mark.full
def test_the_command_runs_in_processes_of_its_own(tmp_path):
    log = fuzz.Log(tmp_path / "log.jsonl")
    tally = fuzz.run(30, 1, log, ["wave"], progress=False)["wave"]
    assert tally.cases == 30 and not tally.failures
