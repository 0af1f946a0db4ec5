"""Damaged files, many of them: each must be refused by name or read as what it says. No crash, no hang, no memory beyond it.

    python -m tests.reliability.fuzz --count 100000              all formats; the result becomes a row of fuzz.csv
    python -m tests.reliability.fuzz --format adapter --case 17  one case here, with its files and what became of it

A case is a format, a seed and a number. Cases run in processes that each take many, under limits of time and address space
(child.py); one that dies or falls silent is started again behind its case. What has been run is kept in a file, so that a
stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("fuzz.csv")
CHUNK = 250  # cases between two notes of what is done
SILENCE = 900  # seconds without a word, after which a process is taken for hung; a busy machine takes minutes to start one
COLUMNS = ("date", "commit", "machine", "python", "torch", "seed", "format", "cases", "refused", "taken", "failed", "slowest s")


@dataclass
class Tally:
    """What became of a format's cases."""

    counts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0  # seconds of processor time
    failures: list[tuple[int, str, str]] = field(default_factory=list)  # number, kind, where

    @property
    def cases(self) -> int:
        return sum(self.counts.values())


class Child:
    """A process that runs cases; see child.py. ``samples``: what it says of good files that it doesn't take."""

    def __init__(self, name: str, seed: int):
        command = [sys.executable, "-m", "tests.reliability.child", name, str(seed)]
        self._errors = tempfile.TemporaryFile("w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.samples: list[str] = []
        while "ready" not in (said := self._next()):
            self.samples.append(said["sample"][1])

    def _listen(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _next(self) -> dict | list:
        """Its next line. TimeoutError where it is silent, EOFError where it is dead."""
        try:
            line = self._lines.get(timeout=SILENCE)
        except queue.Empty:
            raise TimeoutError(f"silent for {SILENCE} s") from None
        if line is None:
            status = self._process.wait()
            self._errors.seek(0)
            raise EOFError(f"{self._errors.read()[-2000:]}\ndead, exit status {status}")
        return json.loads(line)

    def run(self, start: int, stop: int) -> Iterator[tuple[int, str, float, str]]:
        self._process.stdin.write(f"{start} {stop}\n")
        self._process.stdin.flush()
        for _ in range(start, stop):
            yield tuple(self._next())

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def run_format(name: str, seed: int, start: int, stop: int, note: Callable[[tuple[int, str, float, str]], None]) -> None:
    """Every case from ``start`` to below ``stop``, each noted once. RuntimeError where a good file isn't taken."""
    child, at = None, start
    try:
        while at < stop:
            child = child or Child(name, seed)
            if child.samples:
                raise RuntimeError(f"{name}: a good file is refused:\n{child.samples[0]}")
            try:
                for answer in child.run(at, stop):
                    note(answer)
                    at = answer[0] + 1
            except (TimeoutError, EOFError) as error:
                note((at, "hang" if isinstance(error, TimeoutError) else "crash", 0.0, str(error)))
                child.end()
                child, at = None, at + 1
    finally:
        if child is not None:
            child.end()


def add(tally: Tally, answer: tuple[int, str, float, str]) -> None:
    number, kind, seconds, told = answer
    tally.counts[kind] += 1
    tally.slowest = max(tally.slowest, seconds)
    if kind not in ("refused", "taken"):
        tally.failures.append((number, kind, told))


def shares(count: int, names: list[str] | None = None) -> dict[str, int]:
    """How many cases each format gets."""
    from tests.reliability.child import formats

    found = {name: format for name, format in formats().items() if names is None or name in names}
    whole = sum(format.weight for format in found.values())
    return {name: max(1, round(count * format.weight / whole)) for name, format in found.items()}


class Log:
    """What has been run, a line a chunk, so that a stopped run goes on."""

    def __init__(self, path: Path):
        self._path = path
        self.tallies: dict[str, Tally] = {}
        self._done: set[tuple[str, int, int]] = set()
        for line in path.read_text().splitlines() if path.exists() else ():
            self._take(json.loads(line))

    def _take(self, entry: dict) -> None:
        self._done.add((entry["format"], *entry["cases"]))
        tally = self.tallies.setdefault(entry["format"], Tally())
        tally.counts.update(entry["counts"])
        tally.slowest = max(tally.slowest, entry["slowest"])
        tally.failures += map(tuple, entry["failures"])

    def has(self, name: str, start: int, stop: int) -> bool:
        return (name, start, stop) in self._done

    def write(self, name: str, start: int, stop: int, tally: Tally) -> None:
        facts = {"counts": dict(tally.counts), "slowest": tally.slowest, "failures": tally.failures}
        entry = {"format": name, "cases": [start, stop], **facts}
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self._take(entry)


def run(count: int, seed: int, log: Log, names: list[str] | None = None, progress: bool = True) -> dict[str, Tally]:
    """All cases that the log doesn't have."""
    from tqdm.auto import tqdm

    wanted = shares(count, names)
    with tqdm(total=sum(wanted.values()), unit="file", disable=not progress, dynamic_ncols=True, mininterval=2) as bar:
        for name, cases in wanted.items():
            bar.set_description(name)
            todo = [(at, min(at + CHUNK, cases)) for at in range(0, cases, CHUNK)]
            bar.update(sum(stop - start for start, stop in todo if log.has(name, start, stop)))
            todo = [chunk for chunk in todo if not log.has(name, *chunk)]
            if todo:
                _run_chunks(name, seed, todo, log, bar.update)
    return log.tallies


def _run_chunks(name: str, seed: int, todo: list[tuple[int, int]], log: Log, step: Callable[[int], object]) -> None:
    """Runs of neighbouring chunks go to one process."""
    while todo:
        several = [todo.pop(0)]
        while todo and todo[0][0] == several[-1][1]:
            several.append(todo.pop(0))
        tally, ends = Tally(), {stop: start for start, stop in several}

        def note(answer: tuple[int, str, float, str], tally: Tally = tally, ends: dict[int, int] = ends) -> None:
            add(tally, answer)
            step(1)
            if (stop := answer[0] + 1) in ends:
                log.write(name, ends[stop], stop, tally)
                tally.__init__()

        run_format(name, seed, several[0][0], several[-1][1], note)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def commit() -> str:
    """The commit, with a + where files differ from it (this record apart)."""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RESULTS.relative_to(ROOT)}")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def record(tallies: dict[str, Tally], seed: int) -> None:
    """The last run takes the place of the one before: a row a format, and one of all."""
    import torch

    import peftk

    with Path("/proc/cpuinfo").open() as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), platform.machine())
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    same = (today, commit(), f"{model}, {peftk.info().cpu_tier}", platform.python_version(), torch.__version__, seed)
    whole = Tally()
    rows = []
    for name, tally in [*tallies.items(), ("all", whole)]:
        if tally is not whole:
            whole.counts.update(tally.counts)
            whole.failures += tally.failures
            whole.slowest = max(whole.slowest, tally.slowest)
        refused, taken = tally.counts["refused"], tally.counts["taken"]
        rows.append((*same, name, tally.cases, refused, taken, tally.cases - refused - taken, round(tally.slowest, 2)))
    with RESULTS.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


def last_lines(told: str) -> str:
    """Of a traceback, what failed and the last line of ours that led there."""
    lines = [line.strip() for line in told.strip().splitlines()]
    ours = [line for line in lines if line.startswith("File") and "/peftk/" in line]
    return f"{re.sub(r'[0-9]+', 'N', lines[-1][:120]) if lines else ''}  [{ours[-1].partition('/peftk/')[2] if ours else ''}]"


def show(tallies: dict[str, Tally]) -> int:
    """Print what became of the cases, failures by kind; how many failed."""
    failed = 0
    for name, tally in tallies.items():
        kinds: dict[tuple[str, str], list[int]] = {}
        for number, kind, told in tally.failures:
            kinds.setdefault((kind, last_lines(told)), []).append(number)
        failed += len(tally.failures)
        print(f"{name:<16} {tally.cases:>7} cases, {tally.counts['refused']} refused, {tally.counts['taken']} taken,"
              f" {len(tally.failures)} failed; slowest {tally.slowest:.2f} s")  # fmt: skip
        for (kind, where), numbers in sorted(kinds.items(), key=lambda item: -len(item[1])):
            print(f"    {len(numbers):>5} x {kind}: {where}  e.g. --case {numbers[0]}")
    return failed


def show_case(name: str, seed: int, number: int) -> int:
    """One case in this process, its files left to look at."""
    from tests.reliability.child import case, formats, outcome, quiet

    quiet()
    format = formats()[name]
    folder = Path(tempfile.mkdtemp()) / "case"
    kind, told = outcome(format, case(format, format.samples(), seed, number), folder)
    print(f"{folder}: {', '.join(str(path.relative_to(folder)) for path in sorted(folder.rglob('*')))}\n{kind}\n{told}")
    return int(kind not in ("refused", "taken"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000, help="cases, shared among the formats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", action="append", help="only this one; may be given several times")
    parser.add_argument("--case", type=int, help="run one case of --format here and show it")
    parser.add_argument("--log", type=Path, help="where what is done is kept; by default one for commit, seed and count")
    arguments = parser.parse_args()
    if arguments.case is not None:
        return show_case(arguments.format[0], arguments.seed, arguments.case)
    name = f"peftk_fuzz_{commit()}_{arguments.seed}_{arguments.count}.jsonl"
    log = Log(arguments.log or Path(tempfile.gettempdir()) / name)
    tallies = run(arguments.count, arguments.seed, log, arguments.format)
    if arguments.format is None:
        record(tallies, arguments.seed)
    return int(show(tallies) > 0)


if __name__ == "__main__":
    sys.exit(main())
