"""python -m bench --gpu [op ...]: the ops' tests on the GPU, then ours and the peers in turn, beside what the GPU can do."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import report as tables
from bench.gpu import report
from bench.gpu.cases import CASES
from bench.gpu.device import Device, Gpu, NoGpu
from bench.gpu.limits import GpuLimits, fp32_as_it_is, measure_limits
from bench.gpu.measure import ROUNDS, Measured, measure_case

NO_TESTS = 5  # pytest's exit code where nothing was collected
FOOTNOTE = """\
of limit: share of the time that the work's bytes and operations take at the rates measured in this run. Times: GPU time by events
on the current stream, medians of A B A B … in one process; see bench/gpu/measure.py."""


def main(
    argv: Sequence[str] | None = None,
    find: Callable[[], Device] = Gpu,
    limits_of: Callable[[Device], GpuLimits] = measure_limits,
    results: Path = tables.RESULTS,
) -> None:
    """SystemExit, one line that says why, where there is no GPU or a test is red."""
    chosen = arguments(argv)
    try:
        device = find()
    except NoGpu as reason:
        raise SystemExit(f"python -m bench --gpu: no GPU: {reason}") from None
    if not chosen.skip_tests:
        run_tests(chosen.op)
    provenance = report.Provenance.of(device)
    with fp32_as_it_is():
        limits = limits_of(device)
        print(f"{provenance}\nlimits: {limits}\n")
        lines: list[dict[str, str]] = []
        for op in chosen.op:
            print(f"== {op}")
            measured = bench(op, device, limits, chosen.repeat)
            lines += report.lines(op, measured, limits, provenance)
            if chosen.record:
                print("recorded:", report.record(op, measured, limits, provenance, results))
    if chosen.plot:
        from bench.gpu.roofline import draw

        print("drawn:", draw(lines, chosen.plot))
    print(FOOTNOTE)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench --gpu", description=__doc__)
    parser.add_argument("op", nargs="*", help=f"of {', '.join(CASES)}; all of them if none is named")
    parser.add_argument("--record", action="store_true", help="append to bench/results/<gpu>.csv")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw the points under the measured limits")
    parser.add_argument("--repeat", type=int, default=ROUNDS, help=f"least rounds of a case ({ROUNDS})")
    parser.add_argument("--skip-tests", action="store_true", help="time without testing; can't be recorded")
    chosen = parser.parse_args(argv)
    if unknown := [op for op in chosen.op if op not in CASES]:
        parser.error(f"op: expected some of {', '.join(CASES)}, got {', '.join(unknown)}")
    if chosen.repeat < 1:
        parser.error(f"--repeat: expected a positive number, got {chosen.repeat}")
    if chosen.record and chosen.skip_tests:
        parser.error("--record: expected tests; untested figures have no place in the file")
    chosen.op = list(dict.fromkeys(chosen.op)) or list(CASES)
    return chosen


def run_tests(ops: Sequence[str]) -> None:
    """SystemExit where what these ops have for a GPU isn't green: a wrong result has no speed."""
    for op in ops:
        for command in test_commands(op):
            code = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", *command], cwd=tables.ROOT).returncode
            if code not in (0, NO_TESTS):
                raise SystemExit(f"pytest -m gpu {' '.join(command)} is not green: no figures for {op}")


def test_commands(op: str) -> list[list[str]]:
    """The op's one test body by its GPU implementations, and what only a device shows."""
    return [[f"tests/ops/test_{op}.py"], ["tests/gpu", "-k", f"[{op}-"]]


def bench(op: str, device: Device, limits: GpuLimits, rounds: int) -> list[Measured]:
    """Every case of an op, each printed when it is done."""
    torch.manual_seed(0)
    done = []
    for case in CASES[op](device):
        done.append(measure_case(case, device, limits, rounds))
        print(tables.table(done[-1].rows, "us"), end="\n\n", flush=True)
    return done
