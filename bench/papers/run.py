"""Train candidates on tasks and score them: the one loop that every experiment goes through."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftk
from bench.papers.candidates import Candidate, OwnParameters, rates
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
    curve: str = ""  # lines of one curve are joined in the plot


@dataclass(frozen=True)
class Experiment:
    """A spec. ``rows`` measures one seed; most experiments train each line's candidate (``each_line``)."""

    name: str  # of its module and its files
    title: str
    source: str  # paper, section, table
    lines: Sequence[Line]
    axis: str | None = None  # what x is
    rows: Callable[[Bench, Experiment, int], Iterator[Row]] | None = None
    conclusion: Callable[[Sequence[Row]], str] | None = None  # markdown below the table: what follows from the rows
    pictures: Mapping[str, Callable[[Sequence[Row], Path], None]] = field(default_factory=dict)  # by <name>_<key>.png


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
    step_seconds: float | None = None  # of a training step, their median
    ranks: Mapping[str, int] | None = None  # AdaLoRA's by matrix, at the end


@dataclass(frozen=True)
class Training:
    """What a training came to."""

    loss: float  # mean of the last tenth of the steps
    step_seconds: float  # median


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
        key = line.candidate, seed if line.candidate.steps else 0  # what isn't trained is the same for every seed
        if key not in self.done:
            self.done[key] = self._measured(line, seed)
        return replace(self.done[key], line=line, seed=seed)

    def shortened(self, candidate: Candidate) -> Candidate:
        """As it is trained here: QUICK_STEPS steps in a smoke run."""
        return replace(candidate, steps=min(candidate.steps, QUICK_STEPS)) if self.quick else candidate

    def _measured(self, line: Line, seed: int) -> Row:
        start = time.perf_counter()
        candidate = self.shortened(line.candidate)
        config, task = candidate.prepare(self.task(candidate.task))
        model = task.fresh(seed)
        if config is None:
            return Row(line, seed, task.metric, task.score(model), None, 0, time.perf_counter() - start)
        torch.manual_seed(seed)
        is_adalora = isinstance(config, peftk.AdaLoraConfig)
        with tuned(model, config):
            training = train(model, task, candidate, seed, peftk.adalora_schedule if is_adalora else None)
            score = task.score(model.eval())
            count = sum(parameter.numel() for parameter in peftk.trainable_parameters(model))
            ranks = peftk.rank_allocator(model).ranks() if is_adalora else None
        seconds = time.perf_counter() - start
        return Row(line, seed, task.metric, score, training.loss, count, seconds, training.step_seconds, ranks)


@contextlib.contextmanager
def tuned(model: nn.Module, config: Any) -> Iterator[None]:
    """What ``config`` says is trainable: an adapter, attached for so long, or the model's own parameters."""
    if isinstance(config, OwnParameters):
        config.release(model)
        yield
        return
    peftk.attach(model, config)
    try:
        yield
    finally:
        peftk.detach(model)


def train(
    model: nn.Module,
    task: Any,
    candidate: Candidate,
    seed: int,
    follow: Callable[[nn.Module, torch.optim.Optimizer], Any] | None = None,
) -> Training:
    """AdamW on what is trainable; the order of the records is the seed's. ``follow`` puts hooks on the optimizer."""
    steps = candidate.steps
    optimizer = torch.optim.AdamW(rates(model, candidate), weight_decay=0.0)
    if follow is not None:
        follow(model, optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    model.train()
    losses, seconds = [], []
    for rows in batches(task.train, candidate.batch, steps, seed):
        start = time.perf_counter()
        loss = task.loss(model, rows)
        loss.backward()
        nn.utils.clip_grad_norm_(peftk.trainable_parameters(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return Training(statistics.fmean(losses[-max(1, steps // 10) :]), statistics.median(seconds))


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
