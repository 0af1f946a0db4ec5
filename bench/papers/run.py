"""Train candidates on tasks and score them: the one loop that every experiment goes through."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

import peftk
from bench.papers.candidates import Candidate
from bench.papers.tasks import QUICK, TASKS
from peftk.progress import track

WARMUP = 0.1  # of the steps; then the rate falls in a straight line to zero
QUICK_STEPS = 2


@dataclass(frozen=True)
class Line:
    """A row of an experiment's table: what it is called, and where it stands on the plot's axis."""

    name: str
    candidate: Candidate
    x: float | None = None


@dataclass(frozen=True)
class Experiment:
    """A spec. ``rows`` measures one seed; most experiments train each line's candidate (``each_line``)."""

    name: str  # of its module and its files
    title: str
    source: str  # paper, section, table
    lines: Sequence[Line]
    axis: str | None = None  # what x is
    rows: Callable[[Bench, Experiment, int], Iterator[Row]] | None = None


@dataclass(frozen=True)
class Row:
    """What one run came to."""

    line: Line
    seed: int
    metric: str
    score: float
    loss: float | None  # of the last tenth of the steps, in training; None where nothing is trained
    parameters: int
    seconds: float


@dataclass
class Bench:
    """Models and texts, the tasks made of them, and what was trained already."""

    models: Any
    texts: Any
    quick: bool = False
    made: dict[str, Any] = field(default_factory=dict)
    done: dict[tuple[Candidate, int], Row] = field(default_factory=dict)

    def task(self, name: str) -> Any:
        """One of TASKS, made when it is first asked for."""
        if name not in self.made:
            make, sizes = TASKS[name]
            self.made[name] = make(self.models, self.texts, QUICK if self.quick else sizes)
        return self.made[name]

    def measure(self, line: Line, seed: int) -> Row:
        """Train and score a line's candidate, or say what came out the last time."""
        if (line.candidate, seed) not in self.done:
            self.done[line.candidate, seed] = self._measured(line, seed)
        return replace(self.done[line.candidate, seed], line=line)

    def _measured(self, line: Line, seed: int) -> Row:
        start = time.perf_counter()
        config, task = line.candidate.prepare(self.task(line.candidate.task))
        model = task.fresh(seed)
        if config is None:
            return Row(line, seed, task.metric, task.score(model), None, 0, time.perf_counter() - start)
        torch.manual_seed(seed)
        peftk.attach(model, config)
        try:
            loss = train(model, task, line.candidate, seed, self.quick)
            score = task.score(model.eval())
            count = sum(parameter.numel() for parameter in peftk.trainable_parameters(model))
        finally:
            peftk.detach(model)
        return Row(line, seed, task.metric, score, loss, count, time.perf_counter() - start)


def train(model: nn.Module, task: Any, candidate: Candidate, seed: int, quick: bool = False) -> float:
    """AdamW on what is trainable; the order of the records is the seed's. Returns the mean loss of the last tenth of steps."""
    steps = QUICK_STEPS if quick else candidate.steps
    optimizer = torch.optim.AdamW(peftk.trainable_parameters(model), lr=candidate.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    model.train()
    losses = []
    for rows in batches(task.train, candidate.batch, steps, seed):
        loss = task.loss(model, rows)
        loss.backward()
        nn.utils.clip_grad_norm_(peftk.trainable_parameters(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def _rate(step: int, steps: int) -> float:
    warm = max(1, round(WARMUP * steps))
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm + 1))


def batches(records: Sequence[Any], size: int, steps: int, seed: int) -> Iterator[list[Any]]:
    """``steps`` of them, epoch by epoch, each in an order of its own."""
    draw, waiting = random.Random(seed), []
    for _ in range(steps):
        while len(waiting) < size:
            waiting += draw.sample(list(records), len(records))
        yield waiting[:size]
        waiting = waiting[size:]


def each_line(bench: Bench, experiment: Experiment, seed: int) -> Iterator[Row]:
    """A row a line."""
    for line in experiment.lines:
        yield bench.measure(line, seed)


def run(bench: Bench, experiment: Experiment, seeds: Sequence[int], progress: bool = True) -> list[Row]:
    """Every row of every seed. ValueError where an experiment's rows are more or fewer than its lines."""
    made = (row for seed in seeds for row in (experiment.rows or each_line)(bench, experiment, seed))
    turns = track(range(len(seeds) * len(experiment.lines)), experiment.name, progress)
    return [row for _, row in zip(turns, made, strict=True)]
