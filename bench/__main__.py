"""python -m bench <op> [<op> ...]: test the ops, then time them beside their peers. --list names them; "all" is all of them."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

import torch

from bench import report
from bench.measure import Limits, Row, measure_case, measure_limits

SIZE = 4096  # n and k of the recorded cases
FOOTNOTE = """\
of limit: share of the time that the work's bytes and operations take at the rates measured in this run; above 100 % where a
weight stays in L3 between calls. Times: medians of A B A B … in one process."""


def ops() -> list[str]:
    """Every op that has a bench."""
    return sorted(p.stem.removeprefix("bench_") for p in (Path(__file__).parent / "ops").glob("bench_*.py"))


def run_tests(op: str) -> None:
    """SystemExit where the op's tests aren't green: a wrong result has no speed."""
    test = report.ROOT / "tests" / "ops" / f"test_{op}.py"
    if subprocess.run([sys.executable, "-m", "pytest", "-q", str(test)], cwd=report.ROOT).returncode:
        raise SystemExit(f"{test.relative_to(report.ROOT)} is not green: no figures for {op}")


def bench(op: str, size: int, repeat: int, limits: Limits) -> list[Row]:
    """Every case of an op, each printed when it is done."""
    rows: list[Row] = []
    torch.manual_seed(0)
    for case in importlib.import_module(f"bench.ops.bench_{op}").cases(size):
        done = measure_case(case, limits, repeat)
        print(report.table(done), end="\n\n", flush=True)
        rows += done
    return rows


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("op", nargs="*", help="which to time: of --list, or all")
    parser.add_argument("--list", action="store_true", help="name the ops and stop")
    parser.add_argument("--record", action="store_true", help="append to bench/results and rewrite the README's table")
    parser.add_argument("--threads", type=int, default=2, help="for everyone (2)")
    parser.add_argument("--repeat", type=int, default=20, help="rounds of a case (20); slow peers may cut them to 5")
    parser.add_argument("--size", type=int, default=SIZE, help=f"n and k ({SIZE}); others can't be recorded")
    parser.add_argument("--skip-tests", action="store_true", help="time without testing; can't be recorded")
    chosen = parser.parse_args(argv)
    unknown = [op for op in chosen.op if op not in (*ops(), "all")]
    if unknown or not (chosen.op or chosen.list):
        parser.error(f"op: expected some of {', '.join(ops())} or all, got {', '.join(unknown) or 'none'}")
    chosen.op = ops() if "all" in chosen.op else list(dict.fromkeys(chosen.op))
    if chosen.threads < 1 or chosen.repeat < 1:
        parser.error(f"--threads and --repeat: expected positive numbers, got {chosen.threads} and {chosen.repeat}")
    if chosen.record and (chosen.skip_tests or chosen.size != SIZE):
        parser.error(f"--record: expected tests and --size {SIZE}; other figures have no place in the table")
    return chosen


def main(argv: list[str] | None = None) -> None:
    chosen = arguments(argv)
    if chosen.list:
        print("\n".join(ops()))
        return
    torch.set_num_threads(chosen.threads)
    os.environ["OMP_NUM_THREADS"] = str(chosen.threads)  # read by bitsandbytes' own OpenMP runtime, which loads later
    for op in [] if chosen.skip_tests else chosen.op:
        run_tests(op)
    provenance = report.Provenance.here()
    limits = measure_limits()
    print(f"{provenance}\nlimits: {limits}\n")
    for op in chosen.op:
        print(f"== {op}")
        rows = bench(op, chosen.size, chosen.repeat, limits)
        if chosen.record:
            report.rewrite_readme(report.record(op, rows, limits, provenance))
    print(FOOTNOTE)


if __name__ == "__main__":
    main()
