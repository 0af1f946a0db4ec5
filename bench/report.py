"""Results: a table in the terminal, rows in results/<machine>.csv, and the README's table: one of those rows an op."""

from __future__ import annotations

import csv
import datetime
import io
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import peftk
from bench import isa
from bench.limits import Limits
from bench.measure import Row
from peftk.atomic import write_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PACKAGES = ("peftk", "torch", "bitsandbytes", "peft")
WHERE = ("date", "commit", "machine", "threads", "isa", *PACKAGES)
LIMITS = ("limit_read_gb_s", "limit_write_gb_s", "limit_copy_gb_s", "limit_bf16_gflop_s", "limit_fp32_gflop_s")
FIGURES = ("op", "case", "who", "p50_ms", "p90_ms", "rounds", "gb_s", "gflop_s", "share", "error", "ratio", "goal", "met", "note")
FIRST_COLUMNS = (*WHERE, *FIGURES, *LIMITS)  # of the files before the others came
REGISTERS = ("limit_bf16_registers_gflop_s", "limit_fp32_registers_gflop_s")
SECOND_COLUMNS = (*FIRST_COLUMNS, "reached", "extra_mb", *REGISTERS)
COLUMNS = (*SECOND_COLUMNS, "p10_ms", "extra_p10_mb", "extra_p90_mb", "transformers")
TIERS = ("reference", "scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16")
NONE = "–"


@dataclass(frozen=True)
class Provenance:
    """Where figures come from: the first columns of their rows."""

    date: str
    commit: str  # with a + where tracked sources differ from it
    machine: str
    threads: int
    isa: str  # of our CPU kernels; of everyone where it is forced (bench/isa.py)
    versions: dict[str, str]

    @classmethod
    def here(cls) -> Provenance:
        return cls(
            datetime.date.today().isoformat(),
            commit_name(),
            machine_name(),
            torch.get_num_threads(),
            isa.forced() or peftk.info().cpu_tier or "reference",
            {name: version_of(name) for name in PACKAGES},
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


def commit_name() -> str:
    """Short, with a + where sources differ from it; why not where there is no git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    sources = ("csrc", "peftk", "bench/*.py")
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({type(error).__name__})"


def version_of(package: str) -> str:
    """An installed package's, or that it isn't."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# ---- terminal ---------------------------------------------------------------------------------------------------------------


UNITS = {"ms": (1e3, "{:.3f}"), "us": (1e6, "{:.2f}")}  # per second, and how they are written


def table(rows: Iterable[Row], unit: str = "ms") -> str:
    """The rows of an op as text, a block a case; times in a unit of UNITS."""
    header = ("", f"p10 {unit}", f"p50 {unit}", f"p90 {unit}", "extra MB", "GB/s", "GFLOP/s", "of limit", "error", "peftk is", "")
    lines: list[Sequence[str]] = []
    case = None
    for row in rows:
        if row.case != case:
            lines += [(row.case,), header]
            case = row.case
        lines.append(
            (
                f"  {row.who}",
                _figure(row.p10, *UNITS[unit]),
                _figure(row.p50, *UNITS[unit]),
                _figure(row.p90, *UNITS[unit]),
                _figure(row.extra, 1e-6, "{:.1f}"),
                _figure(row.gb_s, 1, "{:.1f}"),
                _figure(row.gflop_s, 1, "{:.0f}"),
                _figure(row.share, 100, "{:.0f} %"),
                _figure(row.error, 1, "{:.2e}"),
                "" if row.p50 is None or row.ratio is None else f"{row.ratio:.2f}x as fast",
                "; ".join([*(f"goal {verdict}" for verdict in row.verdicts), *filter(None, [row.note])]),
            )
        )
    widths = [max((len(line[i]) for line in lines if len(line) > 1), default=0) for i in range(len(header))]
    shown = [i for i in range(len(header)) if any(len(line) > 1 and line[i] not in ("", NONE, header[i]) for line in lines)]
    return "\n".join(_line([line[i] for i in shown] if len(line) > 1 else line, [widths[i] for i in shown]) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    if len(cells) == 1:
        return cells[0]
    first, *middle, last = cells
    aligned = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(middle, widths[1:], strict=False)), last]
    return "  ".join(aligned).rstrip()


def _figure(value: float | None, factor: float, form: str) -> str:
    return NONE if value is None else form.format(value * factor)


# ---- results/<machine>.csv --------------------------------------------------------------------------------------------------


def record(op: str, rows: Sequence[Row], limits: Limits, provenance: Provenance, folder: Path = RESULTS) -> Path:
    """Append the rows to the machine's file; one from before the newest columns gets them, empty. ValueError where the file has
    others."""
    path = folder / f"{provenance.machine}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists() or columns_of(path) != COLUMNS:
        write_csv(path, COLUMNS, read(path) if path.exists() else [])
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writerows(provenance.cells() | row_cells(op, row) | limit_cells(limits) for row in rows)
    return path


def read(path: Path, known: Sequence[tuple[str, ...]] = (COLUMNS, SECOND_COLUMNS, FIRST_COLUMNS)) -> list[dict[str, str]]:
    """The rows of a results file, oldest first, with the columns that came first in ``known``, the newest. ValueError where it
    has columns of none of them."""
    columns = columns_of(path)
    if columns not in known:
        raise ValueError(f"{path}: expected the columns {', '.join(known[0])}, got {', '.join(columns)}")
    with path.open(newline="") as file:
        return [dict.fromkeys(known[0], "") | row for row in csv.DictReader(file)]


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    """The whole file, which appears complete or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


def columns_of(path: Path) -> tuple[str, ...]:
    """A CSV's first line."""
    with path.open(newline="") as file:
        return tuple(next(csv.reader(file), ()))


def number(value: float | None, factor: float = 1.0) -> str:
    """A figure's cell, empty for None."""
    return "" if value is None else f"{value * factor:.6g}"


def row_cells(op: str, row: Row) -> dict[str, str]:
    """A row's own columns."""
    low, high = row.extra_spread or (None, None)
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
        "goal": "; ".join(verdict.goal for verdict in row.verdicts),
        "met": "; ".join(verdict.word for verdict in row.verdicts),
        "reached": "; ".join(verdict.reached for verdict in row.verdicts),
        "note": row.note,
        "extra_mb": number(row.extra, 1e-6),
        "p10_ms": number(row.p10, 1e3),
        "extra_p10_mb": number(low, 1e-6),
        "extra_p90_mb": number(high, 1e-6),
        "transformers": version_of("transformers"),
    }


def limit_cells(limits: Limits) -> dict[str, str]:
    """The limits' columns."""
    floats = (torch.bfloat16, torch.float32)
    rates = (limits.read, limits.write, limits.copy, *(limits.matmul[dtype] for dtype in floats))
    registers = (limits.peak.get(dtype) for dtype in floats)
    return {name: number(rate, 1e-9) for name, rate in zip((*LIMITS, *REGISTERS), (*rates, *registers), strict=True)}


# ---- README -----------------------------------------------------------------------------------------------------------------


def rewrite_readme(results: Path, headlines: Mapping[str, str], readme: Path = ROOT / "README.md") -> None:
    """Put a case of each bench between the two markers, from the folder of the machine's file ``results`` and its neighbours."""
    rewrite_between(readme, BEGIN, END, markdown(of_all_machines(results.parent), headlines))


def of_all_machines(folder: Path = RESULTS) -> list[dict[str, str]]:
    """The rows of every machine's file; files of other columns, and sweeps, are none."""
    files = [path for path in sorted(folder.glob("*.csv")) if columns_of(path) in (COLUMNS, SECOND_COLUMNS, FIRST_COLUMNS)]
    return [row for path in files for row in read(path) if path.stem == row["machine"]]


def rewrite_between(path: Path, begin: str, end: str, table: str) -> None:
    """Put ``table`` between a file's two markers. ValueError, and an untouched file, where they are missing."""
    text = path.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{path}: expected one {begin} and after it one {end}, which hold the table of results")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    path.write_text(f"{before}{begin}\n{table}\n{end}{after}")


def markdown(rows: Sequence[dict[str, str]], headlines: Mapping[str, str]) -> str:
    """A line for each bench of ``headlines`` and machine, its peers in the last column: the newest run of the case whose name
    begins so, with the highest instruction set that it ran on there."""
    lines = [
        "| op | on | case | p50 | GB/s | GFLOP/s | of the limit | error | goal | peers: p50, times as fast peftk is, error |",
        "|---|---|---|--:|--:|--:|--:|--:|---|---|",
    ]
    runs = newest_runs(rows)
    machines = dict.fromkeys(row["machine"] for row in rows)
    shown = [run for op in sorted(headlines) for on in machines if (run := _headline(runs, op, headlines[op], on))]
    for ours, *others in shown:
        goals = zip(ours["goal"].split("; "), ours["met"].split("; "), strict=True)
        goal = "<br>".join(f"{goal}: {met}" for goal, met in goals) if ours["goal"] else NONE
        cells = (_ms(ours), _cell(ours, "gb_s", "{:.1f}"), _cell(ours, "gflop_s", "{:.0f}"), _percent(ours))
        cells = (f"`{ours['op']}`", ours["isa"], ours["case"], *cells, _cell(ours, "error", "{:.1e}"), goal)
        lines.append(f"| {' | '.join(cells)} | {'<br>'.join(map(_peer, others)) or NONE} |")
    for told in dict.fromkeys(stamp(run[0]) for run in shown):
        ops = ", ".join(f"`{run[0]['op']}`" for run in shown if stamp(run[0]) == told)
        lines += ["", f"{ops}: {told}"]
    return "\n".join(lines)


def newest_runs(rows: Iterable[dict[str, str]]) -> list[list[dict[str, str]]]:
    """The rows by run, ours first; of several runs of a case on the same machine, instruction set and threads the last."""
    newest: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        run = newest.setdefault(tuple(row[name] for name in ("machine", "op", "case", "isa", "threads")), [])
        if any(row["who"] == other["who"] for other in run):
            run.clear()
        run.append(row)
    return list(newest.values())


def _headline(runs: Iterable[list[dict[str, str]]], op: str, begins: str, on: str) -> list[dict[str, str]] | None:
    here = [run for run in runs if run[0]["machine"] == on and run[0]["op"] == op]
    fitting = [run for run in here if run[0]["case"].startswith(begins)]
    return max(fitting, key=lambda run: TIERS.index(run[0]["isa"]), default=None)


def stamp(row: dict[str, str]) -> str:
    """When and where a row was measured, and with what."""
    versions = ", ".join(f"{name} {row[name]}" for name in PACKAGES)
    return f"{row['date']}, commit {row['commit']}: {row['machine']}, {row['threads']} threads, {row['isa']}; {versions}."


def _peer(row: dict[str, str]) -> str:
    if row["extra_mb"]:
        return f"{row['who']}: {_ms(row)}"
    if not row["p50_ms"]:
        return f"{row['who']}: {row['note']}"
    return f"{row['who']}: {_ms(row)}, {_cell(row, 'ratio', '{:.2f}x')}, {_cell(row, 'error', '{:.1e}')}"


def _ms(row: dict[str, str]) -> str:
    """Or the memory, where that was measured."""
    if row["extra_mb"]:
        return _cell(row, "extra_mb", "{:.1f} MB")
    return _cell(row, "p50_ms", "{:.3g} ms")


def _percent(row: dict[str, str]) -> str:
    return f"{float(row['share']) * 100:.0f} %" if row["share"] else NONE


def _cell(row: dict[str, str], name: str, form: str) -> str:
    return form.format(float(row[name])) if row[name] else NONE
