"""python -m bench.papers [EXPERIMENT ...]: run the papers' experiments; ``fetch`` and ``convert`` get and hand on the corpora,
``readme`` writes the README's table of methods and the records on the methods' pages."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.papers import convert, corpora, record, seven_methods
from bench.papers.models import RealModels, TinyModels
from bench.papers.run import Bench, Experiment, run
from bench.papers.texts import Sample, Texts, words_of
from bench.report import Provenance
from peftk.cli.errors import UserError

EXPERIMENTS = (
    *("probing", "prompt_encoder", "prefix_variants", "reparametrisation", "prompt_length", "prompt_init", "ensemble"),
    *("lora_rank", "adalora_budget", "qlora_gap", "seven_methods", "merged_latency"),
)


def experiment(name: str) -> Experiment:
    """A module's EXPERIMENT."""
    return importlib.import_module(f"bench.papers.{name}").EXPERIMENT


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.papers", description=__doc__.split(":")[0])
    made.add_argument(
        "what", nargs="*", help=f"experiments: {', '.join(EXPERIMENTS)} (all of them); or fetch; or convert NAME; or readme"
    )
    made.add_argument("--corpora", type=Path, default=corpora.cache_folder(), help="unpacked Debian packages (%(default)s)")
    made.add_argument("--archives", type=Path, help="fetch: a folder with the .deb files, instead of apt-get download")
    made.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    made.add_argument("--quick", action="store_true", help="tiny models, made-up words, two steps: does it run at all?")
    made.add_argument("--out", type=Path, help="where results go (bench/papers/results; none for --quick); convert: a new folder")
    made.add_argument("--limit", type=int, help="convert: at most so many training records")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    flags = parser().parse_args(arguments)
    try:
        if flags.what[:1] == ["fetch"]:
            print("unpacked:", ", ".join(corpora.fetch(flags.corpora, flags.archives)) or "nothing, all is there")
        elif flags.what[:1] == ["convert"]:
            _convert(flags)
        elif flags.what[:1] == ["readme"]:
            seven_methods.write_readme()
            seven_methods.write_pages()
        else:
            _run(flags)
    except (UserError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _convert(flags: argparse.Namespace) -> None:
    if len(flags.what) != 2 or flags.out is None:
        raise UserError(f"convert: expected a name ({', '.join(convert.KINDS)}) and --out FOLDER")
    name = flags.what[1]
    counts = convert.convert(Texts(flags.corpora), name, flags.out, limit=flags.limit)
    told = ", ".join(f"{n} in {part}.jsonl" for part, n in counts.items())
    print(f"{flags.out}: {told}; peftk finetune --task {convert.KINDS[name][0]} --data {flags.out}/train.jsonl")


def _run(flags: argparse.Namespace) -> None:
    names = flags.what or EXPERIMENTS
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        raise UserError(f"experiments: expected some of {', '.join(EXPERIMENTS)}, got {', '.join(unknown)}")
    if flags.quick:
        sample = Sample()
        bench = Bench(TinyModels(words_of(sample)), sample, quick=True)
    else:
        bench = Bench(RealModels(), Texts(flags.corpora))
    for name in names:
        start, spec = time.perf_counter(), experiment(name)
        rows = run(bench, spec, range(flags.seeds))
        provenance = Provenance.here()
        print(record.markdown(spec, rows, provenance))
        folder = flags.out or (None if flags.quick else record.RESULTS)
        if folder is not None:
            print(*record.write(spec, rows, provenance, folder), sep="\n")
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
