"""Timing: the candidates of a case in turn, A B A B in one process, beside the machine's limits measured in the same run.

Before each timed call stands a pause: bitsandbytes brings an OpenMP runtime of its own, whose threads spin for a while after a
call and would take the cores from whoever comes next. The clock stops before a result is freed.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

PAUSE = 0.003  # s; spinning OpenMP threads give up after about 1 ms
BUDGET = 30.0  # s a case; slow peers get fewer rounds, never fewer than LEAST_ROUNDS
LEAST_ROUNDS = 5
LIMIT_BYTES = 2**28  # an array of the bandwidth measurement: 8 times a 32 MB L3
LIMIT_SIDE = 2048  # of the square matrices that measure the arithmetic peak


@dataclass(frozen=True)
class Work:
    """What one call cannot do without."""

    read: int  # bytes
    write: int  # bytes
    flop: int = 0
    dtype: torch.dtype = torch.bfloat16  # whose peak the arithmetic is held against


@dataclass(frozen=True)
class Candidate:
    """One way to do a case's work. ``run`` None: it can't run here, and ``note`` says why."""

    who: str
    run: Callable[[], Any] | None = None
    error: Callable[[Any], float] | None = None  # of run's result, relative, against fp64
    work: Work | None = None  # where it differs from the case's: a dense weight has more bytes to read
    note: str = ""


@dataclass(frozen=True)
class Goal:
    """At least ``ratio`` times as fast as the candidate ``who``."""

    who: str
    ratio: float

    def __str__(self) -> str:
        return f">= {self.ratio:g}x {self.who}"


@dataclass(frozen=True)
class Case:
    """One piece of work and who does it; ours is the first candidate."""

    name: str
    work: Work
    candidates: Sequence[Candidate]
    goal: Goal | None = None


@dataclass(frozen=True)
class Limits:
    """What this machine reached in this run; bytes and operations a second."""

    read: float
    write: float
    copy: float  # bytes read plus bytes written
    peak: dict[torch.dtype, float]  # of torch.matmul

    def seconds(self, work: Work) -> float:
        """The least time for this work: its memory traffic or its arithmetic, whichever takes longer."""
        memory = work.read / self.read + work.write / self.write
        return max(memory, work.flop / self.peak[work.dtype])

    def __str__(self) -> str:
        peaks = ", ".join(f"{str(d).removeprefix('torch.')} {p / 1e9:.0f} GFLOP/s" for d, p in self.peak.items())
        return f"read {self.read / 1e9:.1f} GB/s, write {self.write / 1e9:.1f} GB/s, copy {self.copy / 1e9:.1f} GB/s; {peaks}"


@dataclass(frozen=True)
class Row:
    """One candidate's result. Figures are None where it could not run or where they have no meaning."""

    case: str
    who: str
    p50: float | None = None  # s
    p90: float | None = None  # s
    rounds: int = 0
    gb_s: float | None = None
    gflop_s: float | None = None
    share: float | None = None  # of the limit measured in this run
    error: float | None = None  # relative, Frobenius, against fp64
    ratio: float | None = None  # this one's p50 / ours: how many times as fast ours is
    goal: str = ""  # on our row
    met: bool | None = None
    note: str = ""


def measure_case(case: Case, limits: Limits, rounds: int) -> list[Row]:
    """A row for every candidate, also for those that can't run. RuntimeError names a candidate that fails."""
    present = [c for c in case.candidates if c.run is not None]
    if not present or present[0] is not case.candidates[0]:
        raise ValueError(f"{case.name}: expected our own candidate first and able to run, got {case.candidates[0].note!r}")
    errors = {c.who: _error(case, c) for c in present}
    times = interleave([c.run for c in present], rounds)
    p50 = {c.who: statistics.median(t) for c, t in zip(present, times, strict=True)}
    p90 = {c.who: percentile(t, 0.9) for c, t in zip(present, times, strict=True)}
    ours = present[0].who
    rows = []
    for candidate in case.candidates:
        who = candidate.who
        if candidate.run is None:
            rows.append(Row(case.name, who, note=candidate.note))
            continue
        work = candidate.work or case.work
        goal, met = _judge(case.goal, p50, ours) if who == ours else ("", None)
        rows.append(
            Row(
                case.name,
                who,
                p50[who],
                p90[who],
                len(times[0]),
                (work.read + work.write) / p50[who] / 1e9,
                work.flop / p50[who] / 1e9 if work.flop else None,
                limits.seconds(work) / p50[who],
                errors[who],
                None if who == ours else p50[who] / p50[ours],
                goal,
                met,
                candidate.note,
            )
        )
    return rows


def _error(case: Case, candidate: Candidate) -> float | None:
    """Run once and hold the result against fp64."""
    try:
        result = candidate.run()
    except Exception as error:
        raise RuntimeError(f"{case.name}: {candidate.who} failed: {error}") from error
    return candidate.error(result) if candidate.error else None


def _judge(goal: Goal | None, p50: dict[str, float], ours: str) -> tuple[str, bool | None]:
    if goal is None:
        return "", None
    return str(goal), p50[goal.who] / p50[ours] >= goal.ratio if goal.who in p50 else None


def interleave(runs: Sequence[Callable[[], Any]], rounds: int, budget: float = BUDGET, pause: float = PAUSE) -> list[list[float]]:
    """Seconds of each call, one list a run: A B C A B C … for ``rounds`` rounds after a warm-up, or fewer once ``budget``
    seconds are spent."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(rounds):
            if done >= LEAST_ROUNDS and time.perf_counter() - start > budget:
                break
            for run, list_of_times in zip(runs, times, strict=True):
                time.sleep(pause)
                before = time.perf_counter()
                result = run()
                list_of_times.append(time.perf_counter() - before)
                del result
    finally:
        if collecting:
            gc.enable()
    return times


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1]


def measure_limits(size: int = LIMIT_BYTES, side: int = LIMIT_SIDE, rounds: int = 7) -> Limits:
    """Memory bandwidth on arrays of ``size`` bytes, all mapped beforehand, and torch.matmul's best rate; each the best of
    ``rounds``, with torch's threads."""
    source = torch.ones(size // 4, dtype=torch.float32)
    target = torch.ones_like(source)
    read = min(_best(lambda: torch.dot(source, source), rounds), _best(source.sum, rounds))
    copy = _best(lambda: target.copy_(source), rounds)
    write = min(_best(target.zero_, rounds), copy)
    peak = {dtype: 2 * side**3 / _best_matmul(side, dtype, rounds) for dtype in (torch.bfloat16, torch.float32)}
    return Limits(size / read, size / write, 2 * size / copy, peak)


def _best_matmul(side: int, dtype: torch.dtype, rounds: int) -> float:
    a, b = torch.randn(2, side, side).to(dtype)
    out = torch.empty_like(a)
    return _best(lambda: torch.mm(a, b, out=out), rounds)


def _best(run: Callable[[], Any], rounds: int) -> float:
    return min(interleave([run], rounds, budget=10.0)[0])


def relative_error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the truth (fp64); ValueError where the shapes differ."""
    if result.shape != truth.shape:
        raise ValueError(f"result: expected the truth's shape {tuple(truth.shape)}, got {tuple(result.shape)}")
    return float((result.double() - truth).norm() / truth.norm())
