"""python -m bench [NAME ...]: test, then time ours beside every peer that is installed; one table at the end.

Without a name: every op and the training step of a real model. --list tells the names; "all" is every bench. --recorded, --page
and --readme look at recorded rows and time nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import catalogue, isa, report, running
from bench.catalogue import END_TO_END, SWEEP, benches, ops
from bench.limits import measure_limits
from peftk.progress import write

SIZE = 4096  # n and k of the recorded cases
FOOTNOTE = """\
of limit: share of the time that the work's bytes and operations take at the rates measured in this run; above 100 % where a
weight stays in L3 between calls. Times: medians of A B A B … in one process."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    names = [*benches(), SWEEP]
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    parser.add_argument(
        "--compare", metavar="COMMIT", help="build that commit too and time ours in turn; exit status 1 where it is slower here"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of --compare: processes a side (5)")
    parser.add_argument("--recorded", action="store_true", help="of --compare, --plot: of recorded rows, untimed")
    parser.add_argument(
        "--plot", type=Path, metavar="FOLDER", help="pictures: time and share of the limit over m, memory over size"
    )
    parser.add_argument("--from", type=Path, metavar="FILE", dest="source", help="of sweep --plot: a recorded one, untimed")
    parser.add_argument("--page", type=Path, metavar="FILE", help="every recorded result as one HTML file, untimed")
    parser.add_argument(
        "--readme", action="store_true", help="rewrite the README's tables and pictures from recorded rows, untimed"
    )
    chosen = parser.parse_args(argv)
    if chosen.static:
        return chosen
    unknown = [name for name in chosen.name if name not in (*names, "all")]
    if unknown:
        parser.error(f"name: expected some of {', '.join(names)} or all, got {', '.join(unknown)}")
    chosen.untimed = chosen.recorded or bool(chosen.page) or chosen.readme or bool(chosen.source)
    if chosen.untimed and (chosen.record or chosen.isa or (chosen.name and not chosen.source)):
        parser.error("--recorded, --page, --readme: expected no name, --record or --isa beside them; they time nothing")
    if chosen.recorded and not (chosen.plot or chosen.compare):
        parser.error("--recorded: expected --compare COMMIT or --plot FOLDER beside it")
    if chosen.compare and (chosen.record or chosen.plot or chosen.isa or SWEEP in chosen.name):
        parser.error(f"--compare: expected no --record, --plot, --isa or {SWEEP} beside it")
    if chosen.source and (not chosen.plot or chosen.name != [SWEEP]):
        parser.error(f"--from: expected {SWEEP} alone, and --plot FOLDER")
    if min(chosen.threads, chosen.repeat, chosen.rounds) < 1:
        given = f"{chosen.threads}, {chosen.repeat} and {chosen.rounds}"
        parser.error(f"--threads, --repeat and --rounds: expected positive numbers, got {given}")
    if chosen.record and (chosen.skip_tests or chosen.size != SIZE):
        parser.error(f"--record: expected tests and --size {SIZE}; other figures have no place in the table")
    if chosen.profile and (chosen.name != [END_TO_END] or chosen.record):
        parser.error(f"--profile: expected {END_TO_END} alone, without --record")
    named = [name for given in chosen.name for name in (benches() if given == "all" else [given])]
    chosen.name = list(dict.fromkeys(named)) or [*ops(), END_TO_END]
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 where a bench failed, or where --compare found something slower."""
    argv = sys.argv[1:] if argv is None else argv
    if "--regimes" in argv:
        importlib.import_module("bench.gpu.regimes").main([word for word in argv if word != "--regimes"])
        return 0
    if "--gpu" in argv:
        importlib.import_module("bench.gpu.run").main([word for word in argv if word != "--gpu"])
        return 0
    chosen = arguments(argv)
    if chosen.list:
        print("\n".join([*benches(), SWEEP]))
    elif chosen.static:
        importlib.import_module("bench.static.report").main(chosen.name, chosen.record)
    elif chosen.compare:
        return compare(chosen)
    elif chosen.untimed:
        show_recorded(chosen)
    else:
        return time(chosen, argv)
    return 0


def compare(chosen: argparse.Namespace) -> int:
    """This package beside another commit's, measured or recorded."""
    from bench import compare

    if chosen.recorded:
        return compare.recorded(chosen.compare)
    flags = {name: getattr(chosen, name) for name in ("size", "repeat", "threads")}
    return compare.measured(chosen.compare, chosen.name, chosen.rounds, flags)


def show_recorded(chosen: argparse.Namespace) -> None:
    """Pictures, page and README out of the files in bench/results."""
    from bench import pictures

    if chosen.source:
        from bench.sweep.plot import draw

        print("drawn:", *draw(catalogue.module_of(SWEEP).read(chosen.source), chosen.plot))
    elif chosen.plot:
        print("drawn:", *pictures.draw(report.of_all_machines(), pictures.sweeps(), chosen.plot))
    if chosen.readme:
        report.rewrite_readme(report.RESULTS / "any.csv", catalogue.headlines())
        print("written: README.md,", *pictures.of_readme())
    if chosen.page:
        from bench import page

        print(f"written: {page.write(chosen.page)}")


def time(chosen: argparse.Namespace, argv: Sequence[str]) -> int:
    """Test and time, and draw what came out."""
    if chosen.isa and isa.forced() != chosen.isa:
        isa.start_again(chosen.isa, argv)
    torch.set_num_threads(chosen.threads)
    os.environ["OMP_NUM_THREADS"] = str(chosen.threads)  # read by an OpenMP runtime that a peer brings and loads later
    if chosen.profile:
        print(catalogue.module_of(END_TO_END).profile())
        return 0
    provenance = report.Provenance.here()
    limits = measure_limits()
    write(f"{provenance}\nlimits: {limits}\n")
    settings = running.Settings(chosen.size, chosen.repeat, not chosen.skip_tests, chosen.record)
    done = running.run(chosen.name, settings, limits, provenance)
    write("\n".join(filter(None, [running.summary(done), FOOTNOTE])))
    if chosen.plot:
        from bench import pictures

        write(" ".join(["drawn:", *map(str, pictures.draw(done.lines(limits, provenance), [done.sweep], chosen.plot))]))
    return 1 if done.failed else 0


if __name__ == "__main__":
    sys.exit(main())
