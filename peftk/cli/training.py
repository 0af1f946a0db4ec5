"""The training loop: packed sequences, accumulated gradients, a schedule, checkpoints. Knows nothing of files."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import nn

import peftk
from peftk.cli.errors import UserError, require
from peftk.cli.interrupt import Interrupted
from peftk.cli.packing import batch_order
from peftk.cli.process_memory import peak_bytes, readable
from peftk.methods.attach import find_attached

SCHEDULES = ("cosine", "constant")


class Data(Protocol):
    """What is trained on or held out: ``len`` rows, taken by index."""

    targets: int  # things that the loss is taken on

    def __len__(self) -> int: ...

    def count(self, rows: Sequence[int]) -> int:
        """Targets of some rows."""

    def tokens(self, rows: Sequence[int]) -> int:
        """Tokens that go through the model for some rows."""

    def batch(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Some rows, as the loss takes them, on the CPU."""


class Loss(Protocol):
    """A model's loss over a batch, summed over its targets: an fp32 scalar."""

    model: nn.Module

    def __call__(self, **batch: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Plan:
    """What one run does; the same plan on the same data and weights gives the same losses."""

    steps: int
    batch_size: int
    grad_accum: int
    lr: float
    schedule: str
    warmup_steps: int
    max_grad_norm: float  # 0 for no clipping
    weight_decay: float
    seed: int
    eval_every: int  # 0 for the start and the end only
    save_every: int  # 0 for never

    @property
    def samples_per_step(self) -> int:
        return self.batch_size * self.grad_accum


@dataclass(frozen=True)
class Row:
    """One line of loss.csv; step 0 is the model before training, without the adapter. Losses are means over targets, in nats."""

    step: int
    tokens: int  # or labels, that the loss was taken on, since the start
    lr: float | None
    loss: float | None
    grad_norm: float | None  # before clipping
    eval_loss: float | None
    metrics: dict[str, float] = field(default_factory=dict)  # on what was held out


@dataclass
class Progress:
    """Where a run stands; with the weights, the optimizer's state and the generators' state it is all that resuming needs."""

    step: int = 0
    rows: list[Row] = field(default_factory=list)
    processed: int = 0  # tokens that went through the model
    seconds: float = 0.0  # spent in training steps

    @property
    def tokens_per_second(self) -> float:
        return self.processed / self.seconds if self.seconds else 0.0


def learning_rate(step: int, plan: Plan) -> float:
    """The rate of step 0, 1, ...: a linear warm-up, then constant or half a cosine down towards 0."""
    if step < plan.warmup_steps:
        return plan.lr * (step + 1) / plan.warmup_steps
    if plan.schedule == "constant":
        return plan.lr
    share = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
    return plan.lr * 0.5 * (1 + math.cos(math.pi * share))


@torch.no_grad()
def evaluate(loss: Loss, data: Data, batch_size: int, device: torch.device) -> float:
    """Mean loss a target over all of ``data``, without dropout; uses up no random numbers."""
    model = loss.model
    training = model.training
    model.eval()
    total = 0.0
    for i in range(0, len(data), batch_size):
        batch = data.batch(list(range(i, min(i + batch_size, len(data)))))
        total += loss(**on_device(batch, device)).item()
    model.train(training)
    return total / data.targets


def on_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The same batch there."""
    return {name: values.to(device) for name, values in batch.items()}


def rows_of_step(data: Data, step: int, plan: Plan) -> list[int]:
    """Which rows of the data a step takes."""
    return batch_order(len(data), step * plan.samples_per_step, plan.samples_per_step, plan.seed)


def backward_of_step(loss: Loss, data: Data, step: int, plan: Plan, device: torch.device) -> tuple[float, int]:
    """Accumulate the gradient of the mean over every target of the step's rows; (that mean, how many targets).

    Each micro-batch is divided by the step's whole count, not by its own: a target weighs the same wherever it falls.
    """
    picked = rows_of_step(data, step, plan)
    targets = data.count(picked)
    total = 0.0
    for i in range(0, len(picked), plan.batch_size):
        batch = data.batch(picked[i : i + plan.batch_size])
        part = loss(**on_device(batch, device)) / targets
        part.backward()
        total += part.item()
    return total, targets


def train(
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    data: Data,
    held_out: Data,
    plan: Plan,
    progress: Progress,
    record: Callable[[Row], None],
    save: Callable[[Progress], None],
    measure: Callable[[], dict[str, float]] = dict,
    stop: Callable[[], int] = int,
) -> Progress:
    """Run the steps that ``progress`` has not done yet. ``record`` gets each row as it comes, ``save`` the progress at each
    checkpoint; ``measure`` gives metrics of the model as it is, in eval mode; ``stop`` gives a signal's number once one asks for
    an end. UserError where the loss is no longer finite, Interrupted after a checkpoint where ``stop`` asked."""
    tqdm = require("tqdm.auto", "hf").tqdm
    model = loss.model
    trainable = peftk.trainable_parameters(model)
    device = trainable[0].device
    if not progress.rows:
        first = Row(0, 0, None, None, None, None)
        with _without_adapter(model):
            first = _measured(first, loss, held_out, plan, device, measure)
        _note(progress, first, record)
    model.train()
    bar = tqdm(total=plan.steps, initial=progress.step, unit="step", dynamic_ncols=True)
    while progress.step < plan.steps:
        start = time.perf_counter()
        rate = learning_rate(progress.step, plan)
        for group in optimizer.param_groups:
            group["lr"] = rate
        mean, tokens = backward_of_step(loss, data, progress.step, plan, device)
        norm = _clip(trainable, plan.max_grad_norm)
        if not math.isfinite(mean) or not math.isfinite(norm):
            raise UserError(f"step {progress.step + 1}: loss {mean}, gradient norm {norm}: lower --lr {plan.lr}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.processed += data.tokens(rows_of_step(data, progress.step - 1, plan))
        progress.seconds += time.perf_counter() - start
        row = Row(progress.step, progress.rows[-1].tokens + tokens, rate, mean, norm, None)
        if _due(progress.step, plan.eval_every, plan.steps):
            row = _measured(row, loss, held_out, plan, device, measure)
        _note(progress, row, record)
        bar.set_postfix_str(
            f"loss {mean:.3f}, {progress.tokens_per_second:.0f} tokens/s, {readable(peak_bytes(device))}", refresh=False
        )
        bar.update()
        if progress.step == plan.steps:
            break
        asked = stop()
        if asked or (plan.save_every and progress.step % plan.save_every == 0):
            save(progress)
        if asked:
            bar.close()
            raise Interrupted(f"after step {progress.step} of {plan.steps}, which is saved: --resume goes on", asked)
    bar.close()
    return progress


@contextlib.contextmanager
def _without_adapter(model: nn.Module) -> Iterator[None]:
    """A prompt at random says less than none: the model before training is the one without it."""
    if find_attached(model) is None:
        yield
        return
    with peftk.disable_adapters(model):
        yield


def _measured(
    row: Row, loss: Loss, held_out: Data, plan: Plan, device: torch.device, measure: Callable[[], dict[str, float]]
) -> Row:
    """The row with what was held out measured; as it is where nothing was."""
    if not len(held_out):
        return row
    mean = evaluate(loss, held_out, plan.batch_size, device)
    training = loss.model.training
    loss.model.eval()
    metrics = measure()
    loss.model.train(training)
    return replace(row, eval_loss=mean, metrics=metrics)


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _note(progress: Progress, row: Row, record: Callable[[Row], None]) -> None:
    progress.rows.append(row)
    record(row)


def _clip(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients down to max_norm; returns the norm before."""
    return nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf).item()
