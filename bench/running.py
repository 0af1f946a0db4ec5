"""A run over several benches: one that fails takes none of the others' rows, nor those it had, and the run says so at its end."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench import report
from bench.catalogue import SWEEP, RedTests, Tests, headlines, module_of, rows_of
from bench.limits import Limits
from bench.measure import Row
from peftk.progress import track, write


@dataclass(frozen=True)
class Settings:
    """Of a run; ``tests``: whether a bench's tests come first."""

    size: int  # n and k
    repeat: int  # rounds of a case
    tests: bool = True
    record: bool = False


@dataclass
class Run:
    """What came out: rows and points of the sweep by bench, and why a bench has none or too few."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    sweep: list[dict[str, str]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def lines(self, limits: Limits, provenance: report.Provenance) -> list[dict[str, str]]:
        """The rows as a results file has them."""
        common = provenance.cells() | report.limit_cells(limits)
        return [common | report.row_cells(name, row) for name, rows in self.rows.items() for row in rows]


def run(names: Sequence[str], settings: Settings, limits: Limits, provenance: report.Provenance) -> Run:
    """Every bench in turn, each case printed as it is done."""
    done, tests = Run(), Tests()
    for name in track(names, "bench", len(names) > 1):
        write(f"== {name}")
        try:
            if settings.tests:
                tests.demand(name)
            if name == SWEEP:
                done.sweep = module_of(SWEEP).run(limits, provenance, settings.record)
            else:
                _bench(name, done.rows.setdefault(name, []), settings, limits)
        except RedTests as red:
            done.failed[name] = str(red)
        except Exception as error:
            traceback.print_exc()
            done.failed[name] = f"{type(error).__name__}: {error}"
        if settings.record and done.rows.get(name):
            report.rewrite_readme(report.record(name, done.rows[name], limits, provenance), headlines())
    return done


def _bench(name: str, rows: list[Row], settings: Settings, limits: Limits) -> None:
    """Append every case's rows to ``rows``, so that those before a failure stay."""
    for of_case in rows_of(module_of(name), settings.size, settings.repeat, limits):
        write(report.table(of_case) + "\n")
        rows += of_case


def summary(done: Run) -> str:
    """One table: a line a case, ours with its spread, its goals, and how many times as fast it is as each peer; then failures."""
    lines = [("bench", "case", "p50", "p10 to p90", "of limit", "goals", "times as fast as")]
    for name, rows in done.rows.items():
        for case in dict.fromkeys(row.case for row in rows):
            ours, *others = [row for row in rows if row.case == case]
            lines.append((name, case, *_own(ours), ", ".join(filter(None, map(_peer, others)))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*(text if len(lines) > 1 else ()), *(f"{name}: FAILED: {why}" for name, why in done.failed.items())])


def _own(row: Row) -> tuple[str, str, str, str]:
    value, spread = report.NONE, report.NONE
    if row.extra is not None:
        value = f"{row.extra / 1e6:.1f} MB"
        spread = f"{row.extra_spread[0] / 1e6:.1f} to {row.extra_spread[1] / 1e6:.1f}" if row.extra_spread else spread
    elif row.p50 is not None:
        value = f"{row.p50 * 1e3:.3g} ms"
        spread = f"{row.p10 * 1e3:.3g} to {row.p90 * 1e3:.3g}" if row.p10 is not None else spread
    share = report.NONE if row.share is None else f"{row.share:.0%}"
    return value, spread, share, ", ".join(f"{v.goal}: {v.word}" for v in row.verdicts) or report.NONE


def _peer(row: Row) -> str:
    if row.ratio is not None:
        return f"{row.ratio:.2f}x {row.who}"
    if row.extra is not None:
        return f"{row.who} {row.extra / 1e6:.1f} MB"
    return f"{row.who}: {row.note}" if row.note else ""
