"""Timing on a GPU: the candidates of a case in turn, A B A B, between events on the current stream.

A figure is a median. Rounds go on until the 95 % confidence interval of every candidate's median, from order statistics, is
narrower than SPREAD of it: what repetition can reach. p90 shows how far single calls scatter.

From memory: L2 is emptied before each call and the stream is held until the call is queued, so the figure is of the GPU alone.
On end: several calls, nothing emptied, nothing held; where the GPU waits for Python, that counts. In a graph: the same calls
captured once and replayed, so that nobody waits for Python.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import peftk
from bench.gpu.device import UNKNOWN, Device
from bench.limits import Limits
from bench.measure import Candidate, Case, Row, Work, error_of, rows_of

ROUNDS, MOST_ROUNDS = 50, 1000
WARM_UP = 5  # rounds
SPREAD = 0.02
BUDGET = 20.0  # s of GPU time a case
CONFIDENCE = 1.96  # standard deviations: 95 %


@dataclass(frozen=True)
class GpuCase(Case):
    """One call from memory; with ``calls`` above 1, calls on end; with ``graph`` these as a CUDA graph."""

    graph: bool = False

    @property
    def from_memory(self) -> bool:
        return self.calls == 1 and not self.graph


@dataclass(frozen=True)
class Forced(Candidate):
    """One of ours: ``run`` under peftk.use(implementation)."""

    implementation: str = "cuda"


@dataclass(frozen=True)
class Measured:
    """A case's rows, and what says how steady they are."""

    rows: list[Row]
    spreads: dict[str, float]  # by candidate: see the module's text
    sm_clock_mhz: str  # while the work ran; "low-high" where it moved


def measure_case(case: GpuCase, device: Device, limits: Limits, rounds: int = ROUNDS) -> Measured:
    """A row for every candidate, also for those that can't run. RuntimeError names a candidate that fails."""
    case = captured(case, device) if case.graph else case
    present = [c for c in case.candidates if c.run is not None]
    errors = {}
    for candidate in present:
        with forced(candidate):
            errors[candidate.who] = error_of(case, candidate)
    times = dict(zip([c.who for c in present], interleave(device, case, present, rounds), strict=True))
    times = {who: [t / case.parts for t in seconds] for who, seconds in times.items()}
    clock = device.clock_under(in_turn(present)) if present else UNKNOWN
    spreads = {who: spread(seconds) for who, seconds in times.items()}
    rows = [noted(row, spreads.get(row.who, 0.0), clock) for row in rows_of(case, limits, times, errors)]
    return Measured(rows, spreads, clock)


def forced(candidate: Candidate) -> contextlib.AbstractContextManager[None]:
    """What a candidate runs inside of."""
    return peftk.use(candidate.implementation) if isinstance(candidate, Forced) else contextlib.nullcontext()


def in_turn(candidates: Sequence[Candidate]) -> Callable[[], None]:
    """All of them, one after the other."""

    def run() -> None:
        for candidate in candidates:
            with forced(candidate):
                candidate.run()

    return run


def captured(case: GpuCase, device: Device) -> GpuCase:
    """The case with each candidate's calls as a graph; who can't be captured gets a note that says why, and no figures."""

    def as_graph(candidate: Candidate) -> Candidate:
        if candidate.run is None:
            return candidate

        def calls() -> Any:
            for _ in range(case.calls):
                result = candidate.run()
            return result

        try:
            with forced(candidate):
                replay = device.capture(calls)
        except RuntimeError as error:
            return replace(candidate, run=None, note=f"can't be captured: {str(error).splitlines()[0]}")
        return replace(candidate, run=replay)

    return replace(case, candidates=[as_graph(c) for c in case.candidates])


def interleave(device: Device, case: GpuCase, candidates: Sequence[Candidate], rounds: int = ROUNDS) -> list[list[float]]:
    """Seconds of a call, one list a candidate: A B A B … for at least ``rounds`` rounds after a warm-up, more while a median is
    not steady, fewer once BUDGET is spent."""
    for _ in range(WARM_UP):
        for candidate in candidates:
            seconds(device, case, candidate)
    times: list[list[float]] = [[] for _ in candidates]
    with no_garbage():
        for done in range(1, max(rounds, MOST_ROUNDS) + 1):
            for candidate, mine in zip(candidates, times, strict=True):
                mine.append(seconds(device, case, candidate))
            if done >= rounds and all(spread(mine) < SPREAD for mine in times):
                break
            if sum(map(sum, times)) * case.calls > BUDGET:
                break
    return times


def seconds(device: Device, case: GpuCase, candidate: Candidate) -> float:
    """Of one call, by events on the current stream."""
    start, end = device.event(), device.event()
    repeated = 1 if case.graph else case.calls  # a graph holds all of its calls
    with forced(candidate):
        if case.from_memory:
            device.flush()
            device.hold()
        start.record()
        for _ in range(repeated):
            candidate.run()
        end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / case.calls


def spread(times: Sequence[float]) -> float:
    """Width of the 95 % confidence interval of the median over the median; infinite where there are too few."""
    ordered, count = sorted(times), len(times)
    low = math.floor((count - CONFIDENCE * math.sqrt(count)) / 2) - 1
    if low < 0:
        return math.inf
    return (ordered[count - 1 - low] - ordered[low]) / statistics.median(ordered)


def noted(row: Row, spread: float, clock: str) -> Row:
    """The row, which says where its figure is less steady than it should be."""
    notes = [row.note] if row.note else []
    if row.p50 is not None and spread >= SPREAD:
        notes.append(f"median known to {spread * 100:.1f} % after {row.rounds} rounds")
    if row.p50 is not None and "-" in clock:
        notes.append(f"SM clock moved, {clock} MHz: lock it with nvidia-smi -lgc")
    return replace(row, note="; ".join(notes))


@contextlib.contextmanager
def no_garbage() -> Iterator[None]:
    """No collection while times are taken."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def best(device: Device, run: Callable[[], Any], rounds: int, calls: int = 1, graph: bool = False) -> float:
    """The least seconds of a call: for limits, which nobody is faster than."""
    case = GpuCase("a limit", Work(0, 0), [Candidate("torch", run)], calls=calls, graph=graph)
    case = captured(case, device) if graph else case
    for _ in range(WARM_UP):
        seconds(device, case, case.candidates[0])
    return min(seconds(device, case, case.candidates[0]) for _ in range(rounds))
