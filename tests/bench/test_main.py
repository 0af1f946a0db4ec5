"""bench/__main__.py: names and arguments, tests before figures; every bench's cases are sound."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as main
from bench import catalogue, isa
from bench.__main__ import arguments
from bench.catalogue import benches, headlines, module_of, ops, tests_of
from bench.goals import Goal, as_goals, named_peers
from bench.measure import Candidate, Case, Work

ROOT = Path(__file__).resolve().parents[2]
WITH_CASES = [name for name in benches() if hasattr(module_of(name), "cases")]


@pytest.mark.parametrize("name", WITH_CASES)
def test_cases_are_sound(name: str):
    """Ours first, goals on peers that are there, names of their own, and a result that is right."""
    names = []
    for case in module_of(name).cases(128):
        names.append(case.name)
        who = [c.who for c in case.candidates]
        assert who[0] == "peftk" and len(set(who)) == len(who) > 1
        assert as_goals(case.goals) and set(named_peers(case.goals)) <= set(who[1:])
        assert case.work.read > 0 and case.work.write > 0 and case.calls > 0 and case.parts > 0
        ours = case.candidates[0]
        assert 0 <= ours.error(ours.run()) < 0.1  # 4 bits of a Gaussian: 0.09
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("op", ops())
def test_benches_mirror_the_ops(op: str):
    assert (ROOT / "peftk" / "ops" / op / "__init__.py").exists()


@pytest.mark.parametrize("name", [*benches(), "sweep"])
def test_every_bench_names_tests_that_exist(name: str):
    assert tests_of(name) and all((ROOT / test).exists() for test in tests_of(name))


def test_headlines_are_cases():
    for name in WITH_CASES:
        begins = headlines()[name]
        assert any(case.name.startswith(begins) for case in module_of(name).cases(128)), f"{name}: {begins!r}"


def test_red_tests_give_no_figures(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def pretend(command, **_):
        asked.append(command[-1])
        return subprocess.CompletedProcess(command, returncode=int("lora" in command[-1]))

    monkeypatch.setattr(catalogue.subprocess, "run", pretend)
    tests = catalogue.Tests()
    tests.demand("nf4_linear")
    for name in ("nf4_lora_linear", "memory"):
        with pytest.raises(catalogue.RedTests, match=f"test_nf4_lora_linear.py is not green: no figures for {name}"):
            tests.demand(name)
    tests.demand("nf4_linear")
    assert asked == ["tests/ops/test_nf4_linear.py", "tests/ops/test_nf4_lora_linear.py"]


def test_weights_from_memory_differ():
    """Each of the layers in turn has a weight of its own, and a figure is of one of them."""
    case = module_of("nf4_linear").from_memory(64)
    results = case.candidates[0].run()
    assert case.parts == len(results) == 24 and case.calls == 1
    assert not any(torch.equal(results[0], other) for other in results[1:])
    assert case.work.read < 64 * 64


# ---- a forced instruction set -----------------------------------------------------------------------------------------------


def test_a_forced_instruction_set_starts_again(monkeypatch: pytest.MonkeyPatch):
    class Started(Exception):
        pass

    def execve(program, command, environment):
        assert environment["ONEDNN_MAX_CPU_ISA"] == "AVX2" and environment["PEFTK_CPU_ISA"] == "avx2"
        assert command[1:] == ["-m", "bench", "nf4_linear", "--isa", "avx2", "--size", "64"]
        raise Started

    monkeypatch.setattr(isa.os, "execve", execve)
    with pytest.raises(Started):
        main.main(["nf4_linear", "--isa", "avx2", "--size", "64"])


def test_everyone_is_held_to_it():
    facts = "peftk.info().cpu_tier, torch.backends.cpu.get_cpu_capability(), bench.isa.forced()"
    program = f"import torch, peftk, bench.isa; print({facts})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | isa.FORCED["avx2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    tier, torchs, forced = done.stdout.split()
    assert tier in ("avx2", "None") and torchs == "AVX2" and forced == "avx2"


def test_forced_goals_are_not_to_be_slower():
    run = lambda: None  # noqa: E731
    theirs, dense = Candidate("HF peft on bitsandbytes", run), Candidate("torch dense", run)
    case = Case("a case", Work(1, 1), [Candidate("peftk", run), theirs, dense], Goal("torch dense", 9))
    assert isa.goals_when_forced(case).goals == (Goal("HF peft on bitsandbytes", 1),)
    absent = dataclasses.replace(case, candidates=[case.candidates[0], Candidate("bitsandbytes"), dense])
    assert isa.goals_when_forced(absent) == absent


# ---- arguments --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recorded"], "--recorded: expected --compare COMMIT or --plot FOLDER beside it"),
        (["nf4_linear", "--page", "x"], "--recorded, --page, --readme: expected no name"),
        (["--readme", "--record"], "--recorded, --page, --readme: expected no name, --record"),
        (["--compare", "HEAD", "--record"], "--compare: expected no --record"),
        (["sweep", "--compare", "HEAD"], "--compare: expected no --record, --plot, --isa or sweep beside it"),
        (["--compare", "HEAD", "--rounds", "0"], "expected positive numbers, got 2, 20 and 0"),
        (["nf4_linear", "gemm"], "or all, got gemm"),
        (["nf4_linear", "--repeat", "0"], "expected positive numbers, got 2, 0 and 5"),
        (["nf4_linear", "--record", "--skip-tests"], "--record: expected tests and --size 4096"),
        (["nf4_linear", "--record", "--size", "64"], "--record: expected tests and --size 4096"),
        (["nf4_linear", "--from", "x", "--plot", "x"], "--from: expected sweep alone, and --plot FOLDER"),
        (["sweep", "--from", "x"], "--from: expected sweep alone, and --plot FOLDER"),
        (["nf4_linear", "--profile"], "--profile: expected smollm2 alone"),
        (["nf4_linear", "--isa", "sse"], "invalid choice: 'sse'"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        arguments(argv)
    assert re.search(message, capsys.readouterr().err)


def test_all_means_all():
    assert arguments(["all"]).name == list(benches()) and arguments(["nf4_linear"] * 2).name == ["nf4_linear"]


def test_without_a_name_every_op_and_the_end_to_end_job():
    assert arguments([]).name == [*ops(), "smollm2"]


def test_recorded_rows_are_only_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(main, "time", None)
    monkeypatch.setattr(
        "bench.pictures.draw", lambda rows, sweeps, folder: [f"{len(rows) > 100} {len(sweeps) > 0} {folder.name}"]
    )
    assert main.main(["--recorded", "--plot", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"drawn: True True {tmp_path.name}\n"
