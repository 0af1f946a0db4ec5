"""What the page says, out of recorded rows: goals, tables by machine, and plainly where others are faster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import report
from bench.gpu import report as gpu

Line = dict[str, str]
NONE = report.NONE


@dataclass(frozen=True)
class Peer:
    """Another candidate of a case. ``ratio``: how many times as fast, or as small, ours is; None where it has no figure."""

    who: str
    figure: str
    ratio: float | None
    note: str


@dataclass(frozen=True)
class Case:
    """The newest run of a case on a machine."""

    op: str
    name: str
    machine: str
    isa: str
    threads: str
    figure: str
    spread: str
    rate: str
    share: str
    error: str
    goals: tuple[tuple[str, str, str], ...]  # goal, word, reached
    peers: tuple[Peer, ...]
    note: str
    stamp: str

    @property
    def slower_than(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.ratio is not None and peer.ratio < 1]


def cases(folder: Path = report.RESULTS) -> list[Case]:
    """Of every machine, GPUs among them; the newest run of each case, machine and instruction set."""
    return [case_of(run) for run in report.newest_runs(rows(folder))]


def rows(folder: Path) -> list[Line]:
    """Every machine's."""
    graphics = [path for path in sorted(folder.glob("*.csv")) if report.columns_of(path) == gpu.COLUMNS]
    return report.of_all_machines(folder) + [row for path in graphics for row in report.read(path, (gpu.COLUMNS,))]


def case_of(run: Sequence[Line]) -> Case:
    """Ours comes first."""
    ours, *others = run
    words = [part.split("; ") if part else [] for part in (ours["goal"], ours["met"], ours["reached"])]
    goals = tuple((goal, words[1][i], words[2][i] if i < len(words[2]) else "") for i, goal in enumerate(words[0]))
    rates = [f"{float(ours[name]):.4g} {unit}" for name, unit in (("gb_s", "GB/s"), ("gflop_s", "GFLOP/s")) if ours[name]]
    return Case(
        op=ours["op"],
        name=ours["case"],
        machine=ours["machine"],
        isa=ours["isa"],
        threads=ours["threads"],
        figure=figure(ours),
        spread=spread(ours),
        rate=", ".join(rates) or NONE,
        share=f"{float(ours['share']):.0%}" if ours["share"] else NONE,
        error=f"{float(ours['error']):.1e}" if ours["error"] else NONE,
        goals=goals,
        peers=tuple(peer_of(row, ours) for row in others),
        note=ours["note"],
        stamp=report.stamp(ours),
    )


def peer_of(row: Line, ours: Line) -> Peer:
    """Its ratio of time, or of memory where that was measured."""
    ratio = float(row["ratio"]) if row["ratio"] else None
    if row["extra_mb"] and ours["extra_mb"]:
        ratio = float(row["extra_mb"]) / float(ours["extra_mb"])
    return Peer(row["who"], figure(row), ratio, row["note"])


def figure(row: Line) -> str:
    """Time or memory, with its unit."""
    if row["extra_mb"]:
        return f"{float(row['extra_mb']):.1f} MB"
    return f"{float(row['p50_ms']):.3g} ms" if row["p50_ms"] else NONE


def spread(row: Line) -> str:
    """From p10, where that was recorded, to p90."""
    low, high = (row["extra_p10_mb"], row["extra_p90_mb"]) if row["extra_mb"] else (row["p10_ms"], row["p90_ms"])
    if not high:
        return ""
    return f"{float(low):.3g} to {float(high):.3g}" if low else f"p90 {float(high):.3g}"


def verdicts(found: Sequence[Case]) -> dict[str, int]:
    """How many goals are met, missed and not compared."""
    count = Counter(word for case in found for _, word, _ in case.goals)
    return {word: count[word] for word in ("met", "missed", "not compared")}


def losses(found: Sequence[Case]) -> list[tuple[Case, Peer]]:
    """Every case in which someone else is faster or smaller, the worst first."""
    return sorted(((case, peer) for case in found for peer in case.slower_than), key=lambda loss: loss[1].ratio)


def missed(found: Sequence[Case]) -> list[tuple[Case, str, str]]:
    """Every goal that is missed, with what was reached."""
    return [(case, goal, reached) for case in found for goal, word, reached in case.goals if word == "missed"]


def standing(lines: Sequence[Line]) -> list[tuple[str, int, int]]:
    """Of a sweep: (peer, points in which ours is faster, points in all)."""
    counted: dict[str, list[bool]] = {}
    for line in lines:
        if line["ratio"]:
            counted.setdefault(line["who"], []).append(float(line["ratio"]) >= 1)
    return [(who, sum(wins), len(wins)) for who, wins in counted.items()]


def gates(path: Path) -> tuple[int, int, list[str]]:
    """Of the kernels compiled ahead of time: (gates met, gates in all, targets); none without the file."""
    if not path.exists():
        return 0, 0, []
    ours = [line for line in report.read(path, (report.columns_of(path),)) if line["gate"]]
    return sum(line["gate"] == "met" for line in ours), len(ours), list(dict.fromkeys(line["target"] for line in ours))
