"""python -m bench --static [OP ...]: what the compilers made of every GPU kernel, its gate, bitsandbytes' kernels beside it, and
calculated limits. No GPU is asked: nothing here is a time."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from bench import report
from bench.static import gates, matrix, nvcc, peers, predict
from bench.static.gates import Row
from bench.static.occupancy import capability
from peftk.atomic import write_file
from peftk.progress import track

RESULTS = report.ROOT / "bench" / "results" / "static.csv"
PROVENANCE = ("date", "commit", "nvcc", "triton", "bitsandbytes")
FIGURES = (
    "op", "backend", "kernel", "target", "registers", "shared", "stack", "spills", "threads", "blocks", "occupancy",
    "instructions", "per_element", "wide", "mma", "bytes",
)  # fmt: skip
HEADER = (
    "op", "backend", "kernel", "target", "regs", "shared", "spills", "instr", "instr/elt", "128-bit", "MMA", "blocks/SM",
    "occupancy", "gate",
)  # fmt: skip
FOOTNOTE = f"""\
instr: what a thread issues on the main path or in a round of the hot loop; instr/elt: that for each weight or value of its work.
128-bit: share of global bytes there by accesses of 128 bits. spills: instructions on local memory. Limits: {predict.MARK}."""


def main(ops: Sequence[str], record: bool) -> None:
    """Print the tables. SystemExit where a gate is missed, or where nothing can be compiled."""
    if reason := matrix.why_not():
        raise SystemExit(f"--static: {reason}")
    ours, theirs = {*matrix.ops("cuda"), *matrix.ops("triton")}, {gate.op for gate in gates.read(gates.PEERS)}
    if unknown := [op for op in ops if op not in ours | theirs]:
        known = ", ".join(sorted(ours | theirs))
        raise SystemExit(f"--static: expected ops with GPU kernels, some of {known}, got {', '.join(unknown)}")
    chosen = list(ops) or sorted(ours)
    rows = everything(chosen)
    print(aligned([HEADER, *map(cells, rows)]), end="\n\n")
    print(f"Least microseconds for {predict.SIZE} x {predict.SIZE} elements and what binds: {predict.MARK}")
    print(aligned(predict.table(rows)), end="\n\n")
    print(FOOTNOTE)
    if record:
        write(rows, RESULTS, [] if not ops else kept(RESULTS, chosen))
    if missed := [row for row in rows if row.misses and row.backend != peers.PACKAGE]:
        raise SystemExit("\n".join(f"gate missed: {row.kernel} for {row.target}: {row.met}" for row in missed))


def everything(ops: Sequence[str]) -> list[Row]:
    """Every kernel of these ops for every target, by op and target, ours before bitsandbytes'."""
    table = gates.read()
    jobs = matrix.jobs(ops)
    done = matrix.rows(jobs, table)
    rows = [row for _ in track(jobs, "compile and read", enabled=True) for row in next(done)]
    if reason := peers.why_not():
        print(f"{peers.PACKAGE}: {reason}")
    else:
        rows += [row for target in nvcc.TARGETS for row in peers.rows(ops, target)]
    return sorted(rows, key=_place)


def _place(row: Row) -> tuple[str, int, int]:
    generation = capability(row.target) if row.target.startswith("sm_") else 1000  # AMD's after NVIDIA's
    return row.op, generation, ("cuda", "triton", peers.PACKAGE).index(row.backend)


def cells(row: Row) -> tuple[str, ...]:
    """A row as the terminal shows it."""
    return (
        row.op,
        row.backend,
        row.kernel,
        row.target,
        str(row.registers),
        str(row.shared),
        str(row.spills),
        "" if row.instructions is None else str(row.instructions),
        "" if row.per_element is None else f"{row.per_element:.2f}",
        "" if row.wide is None else f"{row.wide:.0%}",
        row.mma,
        "" if row.blocks is None else str(row.blocks),
        "" if row.occupancy is None else f"{row.occupancy:.0%}",
        verdict(row),
    )


def verdict(row: Row) -> str:
    """Of its gate; bitsandbytes has none."""
    return "" if row.backend == peers.PACKAGE else row.met


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def kept(path: Path, ops: Sequence[str]) -> list[list[str]]:
    """The file's lines of other ops than these; none where there is no file yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [list(line.values()) for line in lines if line["op"] not in ops]


def write(rows: Iterable[Row], path: Path, others: Sequence[Sequence[str]] = ()) -> None:
    """The file anew: these rows, and before them ``others`` as they are."""
    where = report.Provenance.here()
    provenance = (where.date, where.commit, nvcc.release(), version("triton"), where.versions[peers.PACKAGE])
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow((*PROVENANCE, *FIGURES, "gate"))
    out.writerows(others)
    for row in rows:
        values = (*(getattr(row, name) for name in FIGURES), verdict(row))
        out.writerow((*provenance, *("" if v is None else f"{v:.4g}" if isinstance(v, float) else v for v in values)))
    write_file(path, text.getvalue().encode())
