"""python -m bench NAME [NAME ...]: test, then time ours beside its peers. --list tells the names; "all" is every op and layer."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch

from bench import isa, report
from bench.limits import Limits, measure_limits
from bench.measure import Patience, Row, measure_case

SIZE = 4096  # n and k of the recorded cases
ROOMS = ("ops", "layers", "models")
SWEEP = "sweep"
FOOTNOTE = """\
of limit: share of the time that the work's bytes and operations take at the rates measured in this run; above 100 % where a
weight stays in L3 between calls. Times: medians of A B A B … in one process."""


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


def run_tests(names: Sequence[str]) -> None:
    """SystemExit where these benches' tests aren't green: a wrong result has no speed."""
    for test in dict.fromkeys(test for name in names for test in tests_of(name)):
        if subprocess.run([sys.executable, "-m", "pytest", "-q", test], cwd=report.ROOT).returncode:
            raise SystemExit(f"{test} is not green: no figures for {', '.join(n for n in names if test in tests_of(n))}")


def rows_of(module: ModuleType, size: int, repeat: int, limits: Limits) -> Iterator[list[Row]]:
    """Every case of a bench, as they are done."""
    torch.manual_seed(0)
    if hasattr(module, "rows"):
        yield from module.rows(size, repeat, limits)
        return
    patience = Patience()
    for case in module.cases(size):
        case = patience.without_slow(isa.goals_when_forced(case) if isa.forced() else case)
        done = measure_case(case, limits, repeat)
        patience.remember(case, done)
        yield done


def bench(name: str, size: int, repeat: int, limits: Limits) -> list[Row]:
    """Every case of a bench, each printed when it is done."""
    rows: list[Row] = []
    for done in rows_of(module_of(name), size, repeat, limits):
        print(report.table(done), end="\n\n", flush=True)
        rows += done
    return rows


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    names = [*benches(), SWEEP]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", nargs="*", help="what to time: of --list, or all")
    parser.add_argument("--gpu", action="store_true", help="on a GPU instead: python -m bench --gpu --help")
    parser.add_argument("--regimes", action="store_true", help="which GPU kernel from how many rows on: --regimes --help")
    parser.add_argument("--list", action="store_true", help="tell the names and stop")
    parser.add_argument("--static", action="store_true", help="of ops with GPU kernels: compile, gate and count, without a GPU")
    parser.add_argument(
        "--record",
        action="store_true",
        help="append to bench/results and rewrite the README's table; of --static: rewrite static.csv",
    )
    parser.add_argument("--threads", type=int, default=2, help="for everyone (2)")
    parser.add_argument("--repeat", type=int, default=20, help="rounds of a case (20); slow peers may cut them to 5, or 3")
    parser.add_argument("--size", type=int, default=SIZE, help=f"n and k ({SIZE}); others can't be recorded")
    parser.add_argument("--isa", choices=sorted(isa.FORCED), help="hold everyone to an instruction set (a process of its own)")
    parser.add_argument("--skip-tests", action="store_true", help="time without testing; can't be recorded")
    parser.add_argument("--profile", action="store_true", help="of smollm2: where a step's time goes, instead of timing")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="of sweep: draw it")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="source", help="of sweep --plot: a recorded one, untimed")
    chosen = parser.parse_args(argv)
    if chosen.static:
        return chosen
    unknown = [name for name in chosen.name if name not in (*names, "all")]
    if unknown or not (chosen.name or chosen.list):
        parser.error(f"name: expected some of {', '.join(names)} or all, got {', '.join(unknown) or 'none'}")
    chosen.name = list(benches("ops", "layers")) if "all" in chosen.name else list(dict.fromkeys(chosen.name))
    if chosen.threads < 1 or chosen.repeat < 1:
        parser.error(f"--threads and --repeat: expected positive numbers, got {chosen.threads} and {chosen.repeat}")
    if chosen.record and (chosen.skip_tests or chosen.size != SIZE):
        parser.error(f"--record: expected tests and --size {SIZE}; other figures have no place in the table")
    if (chosen.plot or chosen.source) and chosen.name != [SWEEP]:
        parser.error(f"--plot, --from: expected {SWEEP} alone, got {', '.join(chosen.name)}")
    if chosen.source and not chosen.plot:
        parser.error("--from: expected --plot FOLDER beside it")
    if chosen.profile and (chosen.name != ["smollm2"] or chosen.record):
        parser.error("--profile: expected smollm2 alone, without --record")
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if "--regimes" in argv:
        importlib.import_module("bench.gpu.regimes").main([word for word in argv if word != "--regimes"])
        return
    if "--gpu" in argv:
        importlib.import_module("bench.gpu.run").main([word for word in argv if word != "--gpu"])
        return
    chosen = arguments(argv)
    if chosen.list:
        print("\n".join([*benches(), SWEEP]))
        return
    if chosen.static:
        importlib.import_module("bench.static.report").main(chosen.name, chosen.record)
        return
    if chosen.source:
        draw_sweep(module_of(SWEEP).read(chosen.source), chosen.plot)
        return
    if chosen.isa and isa.forced() != chosen.isa:
        isa.start_again(chosen.isa, argv)
    torch.set_num_threads(chosen.threads)
    os.environ["OMP_NUM_THREADS"] = str(chosen.threads)  # read by an OpenMP runtime that a peer brings and loads later
    if chosen.profile:
        print(module_of("smollm2").profile())
        return
    if not chosen.skip_tests:
        run_tests(chosen.name)
    provenance = report.Provenance.here()
    limits = measure_limits()
    print(f"{provenance}\nlimits: {limits}\n")
    for name in chosen.name:
        print(f"== {name}")
        if name == SWEEP:
            lines = module_of(SWEEP).run(limits, provenance, chosen.record)
            if chosen.plot:
                draw_sweep(lines, chosen.plot)
            continue
        rows = bench(name, chosen.size, chosen.repeat, limits)
        if chosen.record:
            report.rewrite_readme(report.record(name, rows, limits, provenance), headlines())
    print(FOOTNOTE)


def draw_sweep(lines: list[dict[str, str]], folder: Path) -> None:
    from bench.sweep.plot import draw

    print("drawn:", *draw(lines, folder))


if __name__ == "__main__":
    main()
