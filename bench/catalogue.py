"""Which benches there are, what tests they stand on, and how one is run."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from bench import isa, report
from bench.limits import Limits
from bench.measure import Case, Patience, Row, measure_case

ROOMS = ("ops", "layers", "models")
END_TO_END = "smollm2"  # the training step of a real model
SWEEP = "sweep"


def benches(*rooms: str) -> dict[str, str]:
    """Name -> module of every bench in these rooms."""
    found = {}
    for room in rooms or ROOMS:
        for path in sorted((Path(__file__).parent / room).glob("bench_*.py")):
            found[path.stem.removeprefix("bench_")] = f"bench.{room}.{path.stem}"
    return found


def ops() -> list[str]:
    """Every op that has a bench."""
    return sorted(benches("ops"))


def module_of(name: str) -> ModuleType:
    return importlib.import_module("bench.sweep.sweep" if name == SWEEP else benches()[name])


def tests_of(name: str) -> tuple[str, ...]:
    """Files of tests that must be green: the op's own, or those that the bench names."""
    return (f"tests/ops/test_{name}.py",) if name in benches("ops") else module_of(name).TESTS


def headlines() -> dict[str, str]:
    """How the name of a bench's one case in the README begins; its first case where it doesn't say."""
    return {name: getattr(module_of(name), "HEADLINE", "") for name in benches()}


class RedTests(Exception):
    """A wrong result has no speed."""


class Tests:
    """Files of tests, each run once and its outcome remembered."""

    def __init__(self) -> None:
        self.green: dict[str, bool] = {}

    def demand(self, name: str) -> None:
        """RedTests where a bench's tests aren't green."""
        for test in tests_of(name):
            if test not in self.green:
                done = subprocess.run([sys.executable, "-m", "pytest", "-q", test], cwd=report.ROOT)
                self.green[test] = not done.returncode
            if not self.green[test]:
                raise RedTests(f"{test} is not green: no figures for {name}")


def cases_of(module: ModuleType, size: int) -> Iterator[Case]:
    """With the goals of a forced instruction set, where one is."""
    for case in module.cases(size):
        yield isa.goals_when_forced(case) if isa.forced() else case


def rows_of(module: ModuleType, size: int, repeat: int, limits: Limits) -> Iterator[list[Row]]:
    """Every case of a bench, as they are done."""
    torch.manual_seed(0)
    if hasattr(module, "rows"):
        yield from module.rows(size, repeat, limits)
        return
    patience = Patience()
    for case in cases_of(module, size):
        case = patience.without_slow(case)
        done = measure_case(case, limits, repeat)
        patience.remember(case, done)
        yield done
