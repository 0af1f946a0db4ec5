"""``python -m bench sweep``: ours, bitsandbytes and the dense layer over SHAPES and ROWS, bf16, single calls after a pause.

Few rounds, fewer still where calls are slow: a picture of the whole rather than figures for one size.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import isa, report
from bench.limits import Limits
from bench.linear import Layer, Step, forward_candidates, forward_work, training_candidates
from bench.measure import Case, Row, measure_case
from peftk.progress import track

TESTS = ("tests/ops/test_nf4_linear.py", "tests/ops/test_nf4_lora_linear.py")
SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048), (4096, 4096), (11008, 4096), (14336, 4096), (4096, 14336))  # n, k
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
FORWARD, TRAINING = "forward", "forward + backward"
PACKED_MOST = 64  # rows: bitsandbytes' inference path, which loses to its other one from some 100 on
ROUNDS, LEAST, BUDGET = 15, 3, 1.0  # s a case
POINT = ("n", "k", "m", "pass")
FIGURES = ("who", "p50_ms", "p90_ms", "rounds", "gb_s", "gflop_s", "share", "ratio", "note")
COLUMNS = (*report.WHERE, *POINT, *FIGURES, *report.LIMITS, *report.REGISTERS)


@dataclass(frozen=True)
class Point:
    """One size."""

    n: int
    k: int
    m: int
    what: str  # FORWARD or TRAINING

    def case(self, layer: Layer) -> Case:
        n, k, m = self.n, self.k, self.m
        name = f"m={m}, {n}x{k}, {self.what}"
        if self.what == FORWARD:
            x = torch.randn(m, k).bfloat16()
            everyone = forward_candidates([layer], x, int4=False, packed=m <= PACKED_MOST, check=False)
            return Case(name, forward_work(x, n, layer.w4.nbytes), everyone)
        step = Step.random(m, n, k, torch.bfloat16)
        return Case(name, step.work(layer.w4.nbytes), training_candidates(layer, step, check=False))


def sweep(
    limits: Limits, shapes: Sequence[tuple[int, int]] = SHAPES, rows: Sequence[int] = ROWS, progress: bool = True
) -> Iterator[tuple[Point, list[Row]]]:
    """Every point with its rows, as they come."""
    points = [Point(*shape, m, what) for shape, what, m in itertools.product(shapes, (FORWARD, TRAINING), rows)]
    layer, layers_shape = None, None
    for point in track(points, "sweep", progress):
        if (point.n, point.k) != layers_shape:
            layer, layers_shape = Layer.random(point.n, point.k, torch.bfloat16), (point.n, point.k)
        yield point, measure_case(point.case(layer), limits, ROUNDS, BUDGET, LEAST)


def cells(point: Point, row: Row, limits: Limits, provenance: report.Provenance) -> dict[str, str]:
    """A line of the file."""
    where = dict(zip(POINT, map(str, (point.n, point.k, point.m, point.what)), strict=True))
    all_cells = report.row_cells("sweep", row)
    figures = {name: all_cells[name] for name in FIGURES}
    return provenance.cells() | where | figures | report.limit_cells(limits)


def results_file(machine: str) -> Path:
    """Of this machine, and of the instruction set where one is forced."""
    suffix = f"-{isa.forced()}" if isa.forced() else ""
    return report.ROOT / "bench" / "results" / f"{machine}-sweep{suffix}.csv"


def read(path: Path) -> list[dict[str, str]]:
    """The lines of a sweep's file. ValueError where it has other columns."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: expected a sweep's columns {', '.join(COLUMNS)}")
        return list(reader)


def run(limits: Limits, provenance: report.Provenance, record: bool) -> list[dict[str, str]]:
    """The whole sweep: printed shape by shape, written where ``record``."""
    lines: list[dict[str, str]] = []
    for (n, k), points in itertools.groupby(sweep(limits), lambda pair: (pair[0].n, pair[0].k)):
        done = [cells(point, row, limits, provenance) for point, rows in points for row in rows]
        print(f"\n{n}x{k}\n{summary(done)}", flush=True)
        lines += done
    if record:
        path = results_file(provenance.machine)
        path.parent.mkdir(exist_ok=True)
        report.write_csv(path, COLUMNS, lines)
        print(f"written to {path.relative_to(report.ROOT)}")
    return lines


def summary(lines: Sequence[dict[str, str]]) -> str:
    """A line for each m and pass: ours in ms, its share of the limit, and how many times as fast it is as each peer."""
    shown = []
    for (what, m), group in itertools.groupby(lines, lambda line: (line["pass"], line["m"])):
        ours, *peers = group
        against = ", ".join(f"{float(p['ratio']):.2f}x {p['who']}" for p in peers if p["ratio"])
        shown.append(f"  {what:<18} m={m:<5} {float(ours['p50_ms']):9.3f} ms {float(ours['share']):5.0%} of the limit  {against}")
    return "\n".join(shown)
