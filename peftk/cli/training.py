"""The training loop: packed sequences, accumulated gradients, a schedule, checkpoints. Knows nothing of files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

import peftk
from peftk.cli.errors import UserError, require
from peftk.cli.loss import LanguageModelLoss, count_targets
from peftk.cli.memory import peak_bytes, readable
from peftk.cli.packing import Sequences, batch_order

SCHEDULES = ("cosine", "constant")


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
    """One line of loss.csv; step 0 is the model before training. Losses are means over tokens, in nats."""

    step: int
    tokens: int  # that the loss was taken on, since the start
    lr: float | None
    loss: float | None
    grad_norm: float | None  # before clipping
    eval_loss: float | None


@dataclass
class Progress:
    """Where a run stands; with the weights, the optimizer's state and the generators' state it is all that resuming needs."""

    step: int = 0
    rows: list[Row] = field(default_factory=list)
    processed: int = 0  # tokens that went through the model, padding included
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
def evaluate(loss: LanguageModelLoss, data: Sequences, batch_size: int, device: torch.device) -> float:
    """Mean loss a token over all of ``data``, without dropout; uses up no random numbers."""
    model = loss.model
    training = model.training
    model.eval()
    total = 0.0
    for i in range(0, len(data), batch_size):
        batch = slice(i, i + batch_size)
        total += loss(data.input_ids[batch].to(device), data.labels[batch].to(device)).item()
    model.train(training)
    return total / data.targets


def backward_of_step(loss: LanguageModelLoss, data: Sequences, step: int, plan: Plan, device: torch.device) -> tuple[float, int]:
    """Accumulate the gradient of the mean over every token of the step's sequences; (that mean, how many tokens).

    Each micro-batch is divided by the step's whole count, not by its own: a token weighs the same wherever it falls.
    """
    picked = batch_order(len(data), step * plan.samples_per_step, plan.samples_per_step, plan.seed)
    tokens = count_targets(data.labels[picked])
    total = 0.0
    for i in range(0, len(picked), plan.batch_size):
        rows = picked[i : i + plan.batch_size]
        part = loss(data.input_ids[rows].to(device), data.labels[rows].to(device)) / tokens
        part.backward()
        total += part.item()
    return total, tokens


def train(
    loss: LanguageModelLoss,
    optimizer: torch.optim.Optimizer,
    data: Sequences,
    held_out: Sequences,
    plan: Plan,
    progress: Progress,
    record: Callable[[Row], None],
    save: Callable[[Progress], None],
) -> Progress:
    """Run the steps that ``progress`` has not done yet. ``record`` gets each row as it comes, ``save`` the progress at each
    checkpoint. UserError where the loss is no longer finite."""
    tqdm = require("tqdm.auto", "hf").tqdm
    model = loss.model
    trainable = peftk.trainable_parameters(model)
    device = trainable[0].device
    if not progress.rows:
        before = evaluate(loss, held_out, plan.batch_size, device) if len(held_out) else None
        _note(progress, Row(0, 0, None, None, None, before), record)
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
        progress.processed += plan.samples_per_step * data.input_ids.shape[1]
        progress.seconds += time.perf_counter() - start
        row = Row(progress.step, progress.rows[-1].tokens + tokens, rate, mean, norm, None)
        if len(held_out) and _due(progress.step, plan.eval_every, plan.steps):
            row = replace(row, eval_loss=evaluate(loss, held_out, plan.batch_size, device))
        _note(progress, row, record)
        bar.set_postfix_str(
            f"loss {mean:.3f}, {progress.tokens_per_second:.0f} tokens/s, {readable(peak_bytes(device))}", refresh=False
        )
        bar.update()
        if plan.save_every and progress.step < plan.steps and progress.step % plan.save_every == 0:
            save(progress)
    bar.close()
    return progress


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _note(progress: Progress, row: Row, record: Callable[[Row], None]) -> None:
    progress.rows.append(row)
    record(row)


def _clip(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients down to max_norm; returns the norm before."""
    return nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf).item()
