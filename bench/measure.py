"""Timing: the candidates of a case in turn, A B A B in one process.

Before each timed run stands a pause: a peer may bring an OpenMP runtime of its own, whose threads spin for a while after a call
and would take the cores from whoever comes next. The clock stops before a result is freed.

A case of several ``calls`` times them back to back after one that isn't timed, so that a candidate finds its own weight in the
cache and its threads awake; one of several ``parts`` times a run that does as many pieces of work, each on a weight of its own,
so that every weight comes from memory. Figures are of one call and one piece.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from bench.goals import AnyGoal, Goal, Outcome, Verdict, as_goals

if TYPE_CHECKING:
    from bench.limits import Limits

PAUSE = 0.003  # s; spinning OpenMP threads give up after about 1 ms
BUDGET = 30.0  # s a case; slow peers get fewer rounds, never fewer than LEAST_ROUNDS
LEAST_ROUNDS = 5
LONG, FEWEST_ROUNDS = 100.0, 3  # s, and the rounds of a case that takes longer than that
ONCE = 10.0  # s; a call that takes longer is timed once
TOO_LONG = 40.0  # s; a candidate whose call is expected to take longer sits out the case


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
    threads: int | None = None  # of torch; None: as many as the process has


@dataclass(frozen=True)
class Case:
    """One piece of work and who does it; ours come first."""

    name: str
    work: Work  # of one call, of one part
    candidates: Sequence[Candidate]
    goals: Goal | Sequence[AnyGoal] = ()
    calls: int = 1  # timed back to back, after one that isn't
    parts: int = 1  # pieces of work that a run does
    ours: int = 1  # how many of the candidates are; peers are held against the first of them that can run


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
    verdicts: tuple[Verdict, ...] = ()  # on our row
    note: str = ""
    extra: int | None = None  # bytes of memory beyond inputs and results, where that is what is measured
    p10: float | None = None  # s
    extra_spread: tuple[int, int] | None = None  # p10 and p90 of ``extra``


def measure_case(case: Case, limits: Limits, rounds: int, budget: float = BUDGET, least: int = LEAST_ROUNDS) -> list[Row]:
    """A row for every candidate, also for those that can't run. RuntimeError names a candidate that fails."""
    present = [c for c in case.candidates if c.run is not None]
    if not present or present[0] is not case.candidates[0]:
        raise ValueError(f"{case.name}: expected our own candidate first and able to run, got {case.candidates[0].note!r}")
    errors = {c.who: error_of(case, c) for c in present}
    threads = torch.get_num_threads()
    try:
        times = interleave(
            [c.run for c in present],
            rounds,
            budget,
            calls=case.calls,
            least=least,
            warm_up=False,  # by the run that was held against fp64
            prepare=lambda i: torch.set_num_threads(present[i].threads or threads),
        )
    finally:
        torch.set_num_threads(threads)
    seconds = {c.who: [t / case.parts for t in list_of_times] for c, list_of_times in zip(present, times, strict=True)}
    return rows_of(case, limits, seconds, errors)


@dataclass
class Patience:
    """What candidates took last, so that a peer which is hundreds of times slower sits out the large cases."""

    last: dict[str, tuple[float, int]] = field(default_factory=dict)  # by candidate: s, flop

    def without_slow(self, case: Case) -> Case:
        """The case without candidates that would take TOO_LONG; their rows say so."""
        candidates = [replace(c, run=None, note=note) if (note := self._note(c, case)) else c for c in case.candidates]
        return replace(case, candidates=candidates)

    def _note(self, candidate: Candidate, case: Case) -> str:
        seconds, flop = self.last.get(candidate.who, (0.0, 0))
        expected = seconds * case.work.flop / flop if flop else 0.0
        return f"left out: would take {expected:.0f} s" if expected > TOO_LONG else ""

    def remember(self, case: Case, rows: Sequence[Row]) -> None:
        """The rows of a case that was measured."""
        self.last |= {row.who: (row.p50, case.work.flop) for row in rows if row.p50}


def rows_of(case: Case, limits: Limits, times: dict[str, list[float]], errors: dict[str, float | None]) -> list[Row]:
    """The case's rows from the seconds measured, by candidate; ours carries the verdicts. Where none of ours could run, peers
    have no ratio."""
    medians = {who: statistics.median(seconds) for who, seconds in times.items()}
    ours = next((c.who for c in case.candidates[: case.ours] if c.who in medians), None)
    rows = []
    for candidate in case.candidates:
        who = candidate.who
        if who not in medians:
            rows.append(Row(case.name, who, note=candidate.note))
            continue
        work, p50 = candidate.work or case.work, medians[who]
        row = Row(
            case.name,
            who,
            p50,
            percentile(times[who], 0.9),
            len(times[who]),
            (work.read + work.write) / p50 / 1e9 if work.read + work.write else None,
            work.flop / p50 / 1e9 if work.flop else None,
            limits.seconds(work) / p50 or None,
            errors.get(who),
            None if ours is None or who == ours else p50 / medians[ours],
            note=candidate.note,
            p10=percentile(times[who], 0.1),
        )
        if who == ours:
            outcome = Outcome(ours, medians, row.share, limits.binding(work))
            row = replace(row, verdicts=tuple(goal.judge(outcome) for goal in as_goals(case.goals)))
        rows.append(row)
    return rows


def error_of(case: Case, candidate: Candidate) -> float | None:
    """Run once and hold the result against fp64. RuntimeError names a candidate that fails."""
    try:
        result = candidate.run()
    except Exception as error:
        raise RuntimeError(f"{case.name}: {candidate.who} failed: {error}") from error
    return candidate.error(result) if candidate.error else None


def interleave(
    runs: Sequence[Callable[[], Any]],
    rounds: int,
    budget: float = BUDGET,
    pause: float = PAUSE,
    calls: int = 1,
    least: int = LEAST_ROUNDS,
    warm_up: bool = True,
    prepare: Callable[[int], Any] = lambda i: None,
) -> list[list[float]]:
    """Seconds of a call, one list a run: A B C A B C … for ``rounds`` rounds after a warm-up, or fewer once ``budget`` seconds
    are spent, though not fewer than ``least`` unless they take LONG; a run that takes longer than ONCE is timed once.
    ``prepare`` gets a run's number before each time."""
    for i, run in enumerate(runs if warm_up else ()):
        prepare(i)
        run()
    times: list[list[float]] = [[] for _ in runs]
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(rounds):
            spent = time.perf_counter() - start
            if (done >= least and spent > budget) or (done >= FEWEST_ROUNDS and spent > LONG):
                break
            for i, run in enumerate(runs):
                if times[i] and times[i][0] > ONCE:
                    continue
                prepare(i)
                time.sleep(pause)
                times[i].append(_seconds(run, calls))
    finally:
        if collecting:
            gc.enable()
    return times


def _seconds(run: Callable[[], Any], calls: int) -> float:
    """Of one call; of several, their mean, after one that isn't timed."""
    if calls == 1:
        before = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - before
        del result
        return seconds
    run()
    before = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - before) / calls


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1]


def relative_error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the truth (fp64); ValueError where the shapes differ."""
    if result.shape != truth.shape:
        raise ValueError(f"result: expected the truth's shape {tuple(truth.shape)}, got {tuple(result.shape)}")
    return float((result.double() - truth).norm() / truth.norm())
