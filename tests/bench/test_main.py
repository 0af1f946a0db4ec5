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
from bench import isa
from bench.__main__ import arguments, benches, module_of, ops
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
    assert main.tests_of(name) and all((ROOT / test).exists() for test in main.tests_of(name))


def test_headlines_are_cases():
    for name in WITH_CASES:
        begins = main.headlines()[name]
        assert any(case.name.startswith(begins) for case in module_of(name).cases(128)), f"{name}: {begins!r}"


def test_red_tests_give_no_figures(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def pretend(command, **_):
        asked.append(command[-1])
        return subprocess.CompletedProcess(command, returncode=int("lora" in command[-1]))

    monkeypatch.setattr(main.subprocess, "run", pretend)
    main.run_tests(["nf4_linear"])
    with pytest.raises(SystemExit, match="test_nf4_lora_linear.py is not green: no figures for nf4_lora_linear, memory"):
        main.run_tests(["nf4_linear", "nf4_lora_linear", "memory"])
    assert asked == ["tests/ops/test_nf4_linear.py"] * 2 + ["tests/ops/test_nf4_lora_linear.py"]


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
        ([], "name: expected some of adamw_step, .* or all, got none"),
        (["nf4_linear", "gemm"], "or all, got gemm"),
        (["nf4_linear", "--repeat", "0"], "expected positive numbers, got 2 and 0"),
        (["nf4_linear", "--record", "--skip-tests"], "--record: expected tests and --size 4096"),
        (["nf4_linear", "--record", "--size", "64"], "--record: expected tests and --size 4096"),
        (["nf4_linear", "--plot", "x"], "--plot, --from: expected sweep alone, got nf4_linear"),
        (["sweep", "--from", "x"], "--from: expected --plot FOLDER beside it"),
        (["nf4_linear", "--profile"], "--profile: expected smollm2 alone"),
        (["nf4_linear", "--isa", "sse"], "invalid choice: 'sse'"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        arguments(argv)
    assert re.search(message, capsys.readouterr().err)


def test_all_means_all():
    assert set(ops()) < set(arguments(["all"]).name) and arguments(["nf4_linear"] * 2).name == ["nf4_linear"]
