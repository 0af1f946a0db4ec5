"""Results: a table in the terminal, rows in results/<machine>.csv, and the README's table, written from those rows."""

from __future__ import annotations

import csv
import datetime
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import peftk
from bench.measure import Limits, Row

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PACKAGES = ("peftk", "torch", "bitsandbytes", "peft")
WHERE = ("date", "commit", "machine", "threads", "isa", *PACKAGES)
LIMITS = ("limit_read_gb_s", "limit_write_gb_s", "limit_copy_gb_s", "limit_bf16_gflop_s", "limit_fp32_gflop_s")
FIGURES = ("op", "case", "who", "p50_ms", "p90_ms", "rounds", "gb_s", "gflop_s", "share", "error", "ratio", "goal", "met", "note")
COLUMNS = (*WHERE, *FIGURES, *LIMITS)
NONE = "–"


@dataclass(frozen=True)
class Provenance:
    """Where figures come from: the first columns of their rows."""

    date: str
    commit: str  # with a + where tracked sources differ from it
    machine: str
    threads: int
    isa: str  # of our CPU kernels
    versions: dict[str, str]

    @classmethod
    def here(cls) -> Provenance:
        return cls(
            datetime.date.today().isoformat(),
            _commit(),
            machine_name(),
            torch.get_num_threads(),
            peftk.info().cpu_tier or "reference",
            {name: _version(name) for name in PACKAGES},
        )

    def cells(self) -> dict[str, str]:
        facts = (self.date, self.commit, self.machine, str(self.threads), self.isa)
        return dict(zip(WHERE, facts, strict=False)) | self.versions

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return f"{self.machine}, {self.threads} threads, {self.isa}; {versions}; commit {self.commit}, {self.date}"


def machine_name(cpuinfo: str | None = None, cores: int | None = None) -> str:
    """Model, family and model number of the processor and its cores: ``amd-epyc-f25m17-2cores``; no host's name."""
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text() if path.exists() else f"model name : {platform.processor() or platform.machine()}"
    facts = dict(re.findall(r"^([\w ]+?)\s*: *(.*)$", cpuinfo, re.MULTILINE))
    parts = [facts.get("model name") or platform.machine()]
    if "cpu family" in facts and "model" in facts:
        parts.append(f"f{facts['cpu family']}m{facts['model']}")
    parts.append(f"{cores or torch.multiprocessing.cpu_count()}cores")
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    sources = ("csrc", "peftk", "bench/*.py")
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({type(error).__name__})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# ---- terminal ---------------------------------------------------------------------------------------------------------------


def table(rows: Iterable[Row]) -> str:
    """The rows of an op as text, a block a case."""
    header = ("", "p50 ms", "p90 ms", "GB/s", "GFLOP/s", "of limit", "error", "peftk is", "")
    lines: list[Sequence[str]] = []
    case = None
    for row in rows:
        if row.case != case:
            lines += [(row.case,), header]
            case = row.case
        verdict = "" if not row.goal else f"goal {row.goal}: {_verdict(row.met)}"
        lines.append(
            (
                f"  {row.who}",
                _figure(row.p50, 1e3, "{:.3f}"),
                _figure(row.p90, 1e3, "{:.3f}"),
                _figure(row.gb_s, 1, "{:.1f}"),
                _figure(row.gflop_s, 1, "{:.0f}"),
                _figure(row.share, 100, "{:.0f} %"),
                _figure(row.error, 1, "{:.2e}"),
                "" if row.p50 is None or row.ratio is None else f"{row.ratio:.2f}x as fast",
                "; ".join(filter(None, (verdict, row.note))),
            )
        )
    widths = [max((len(line[i]) for line in lines if len(line) > 1), default=0) for i in range(len(header))]
    return "\n".join(_line(line, widths) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    if len(cells) == 1:
        return cells[0]
    first, *middle, last = cells
    aligned = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(middle, widths[1:], strict=False)), last]
    return "  ".join(aligned).rstrip()


def _figure(value: float | None, factor: float, form: str) -> str:
    return NONE if value is None else form.format(value * factor)


def _verdict(met: bool | None) -> str:
    return {True: "met", False: "missed", None: "not compared"}[met]


# ---- results/<machine>.csv --------------------------------------------------------------------------------------------------


def record(
    op: str, rows: Sequence[Row], limits: Limits, provenance: Provenance, folder: Path = ROOT / "bench" / "results"
) -> Path:
    """Append the rows to the machine's file. ValueError where the file has other columns."""
    path = folder / f"{provenance.machine}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    if not fresh:
        read(path)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(provenance.cells() | _cells(op, row) | _limit_cells(limits) for row in rows)
    return path


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a results file, oldest first. ValueError where it has other columns."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}, got {', '.join(reader.fieldnames or ())}")
        return list(reader)


def _cells(op: str, row: Row) -> dict[str, str]:
    def number(value: float | None, factor: float = 1.0) -> str:
        return "" if value is None else f"{value * factor:.6g}"

    return {
        "op": op,
        "case": row.case,
        "who": row.who,
        "p50_ms": number(row.p50, 1e3),
        "p90_ms": number(row.p90, 1e3),
        "rounds": str(row.rounds),
        "gb_s": number(row.gb_s),
        "gflop_s": number(row.gflop_s),
        "share": number(row.share),
        "error": number(row.error),
        "ratio": number(row.ratio),
        "goal": row.goal,
        "met": _verdict(row.met) if row.goal else "",
        "note": row.note,
    }


def _limit_cells(limits: Limits) -> dict[str, str]:
    rates = (limits.read, limits.write, limits.copy, limits.peak[torch.bfloat16], limits.peak[torch.float32])
    return {name: f"{rate / 1e9:.6g}" for name, rate in zip(LIMITS, rates, strict=True)}


# ---- README -----------------------------------------------------------------------------------------------------------------


def rewrite_readme(results: Path, readme: Path = ROOT / "README.md") -> None:
    """Put the newest run of every case between the two markers. ValueError, and an untouched README, where they are missing."""
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme}: expected one {BEGIN} and after it one {END}, which hold the table of results")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{markdown(read(results))}\n{END}{after}")


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """One line a case, its peers in the last column; from a file's rows, of which the newest run of a case counts."""
    newest: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        run = newest.setdefault((row["op"], row["case"]), [])
        if any(row["who"] == other["who"] for other in run):
            run.clear()
        run.append(row)
    lines = [
        "| op | case | p50 | GB/s | GFLOP/s | of the limit | error | goal | peers: p50, how many times as fast peftk is, error |",
        "|---|---|--:|--:|--:|--:|--:|---|---|",
    ]
    for (op, case), run in sorted(newest.items(), key=lambda item: item[0][0]):
        ours, *others = run
        goal = f"{ours['goal']}: {ours['met']}" if ours["goal"] else NONE
        cells = (_ms(ours), _cell(ours, "gb_s", "{:.1f}"), _cell(ours, "gflop_s", "{:.0f}"), _percent(ours))
        cells = (f"`{op}`", case, *cells, _cell(ours, "error", "{:.1e}"), goal, "<br>".join(map(_peer, others)) or NONE)
        lines.append(f"| {' | '.join(cells)} |")
    for stamp in dict.fromkeys(_stamp(run[0]) for run in newest.values()):
        lines += ["", stamp]
    return "\n".join(lines)


def _stamp(row: dict[str, str]) -> str:
    versions = ", ".join(f"{name} {row[name]}" for name in PACKAGES)
    return f"{row['date']}, commit {row['commit']}: {row['machine']}, {row['threads']} threads, {row['isa']}; {versions}."


def _peer(row: dict[str, str]) -> str:
    if not row["p50_ms"]:
        return f"{row['who']}: {row['note']}"
    return f"{row['who']}: {_ms(row)}, {_cell(row, 'ratio', '{:.2f}x')}, {_cell(row, 'error', '{:.1e}')}"


def _ms(row: dict[str, str]) -> str:
    return _cell(row, "p50_ms", "{:.3g} ms")


def _percent(row: dict[str, str]) -> str:
    return f"{float(row['share']) * 100:.0f} %" if row["share"] else NONE


def _cell(row: dict[str, str], name: str, form: str) -> str:
    return form.format(float(row[name])) if row[name] else NONE
