"""One prompt against the vote of five on the same frozen model: trained in one batch, asked in one batch."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import peftk
from bench.papers.prompt_init import VOCABULARY
from bench.papers.run import Bench, Experiment, Line, Row, train
from bench.papers.tasks import AT_ONCE

VOTES = 5
MEAN, BEST, VOTE = Line("one, their mean", VOCABULARY), Line("one, the best", VOCABULARY), Line("five, a vote", VOCABULARY)


@dataclass
class SideBySide:
    """A task for several prompts at once: a record is a record for each of them, in an order of its own."""

    task: Any
    names: Sequence[str]
    seed: int

    @property
    def train(self) -> list[tuple[Any, ...]]:
        """Tuples, one of the task's records a prompt."""
        records = list(self.task.train)
        orders = [random.Random(self.seed * VOTES + i).sample(records, len(records)) for i in range(len(self.names))]
        return list(zip(*orders, strict=True))

    def loss(self, model: nn.Module, rows: Sequence[tuple[Any, ...]]) -> torch.Tensor:
        """The mean over all prompts; a prompt's gradient is that of its own rows."""
        with peftk.adapters_per_row(model, [name for name in self.names for _ in rows]):
            return self.task.loss(model, [row[i] for i in range(len(self.names)) for row in rows])


def rows(bench: Bench, experiment: Experiment, seed: int) -> Iterator[Row]:
    """Train VOTES prompts from starts of their own, and let them answer alone and together."""
    start = time.perf_counter()
    config, task = VOCABULARY.prepare(bench.task(VOCABULARY.task))
    model = task.fresh(seed)
    names = [f"prompt{i}" for i in range(VOTES)]
    try:
        for i, name in enumerate(names):
            torch.manual_seed(seed * VOTES + i)
            peftk.attach(model, config, adapter_name=name)
        peftk.set_adapter(model, names)
        training = train(model, SideBySide(task, names, seed), bench.shortened(VOCABULARY), seed)
        count = sum(parameter.numel() for parameter in peftk.trainable_parameters(model)) // VOTES
        alone, together = answers(model.eval(), task, names)
    finally:
        peftk.detach(model)
    seconds = time.perf_counter() - start
    for line, score in ((MEAN, sum(alone) / VOTES), (BEST, max(alone)), (VOTE, together)):
        yield Row(line, seed, f"{task.metric}, whole vocabulary", score, training.loss, count, seconds)


@torch.no_grad()
def answers(model: nn.Module, task: Any, names: Sequence[str]) -> tuple[list[float], float]:
    """(each prompt's precision at 1, the vote's), over the whole vocabulary: all prompts in one batch."""
    hits, of_vote = torch.zeros(len(names)), 0.0
    for at in range(0, len(task.test), AT_ONCE):
        batch = task.test[at : at + AT_ONCE]
        right = torch.tensor([answer[0] for _, answer in batch])
        inputs = task.template.inputs([text for text, _ in batch])
        # The last column as a tensor: with a number, the head's weight is copied for every row (9 GB for 160 of SmolLM2's).
        said = peftk.prompt_ensemble(model, names, **inputs, logits_to_keep=torch.tensor([-1]))
        hits += (said.logits[:, :, -1].argmax(-1) == right).sum(1)
        of_vote += (said.predictions[:, -1] == right).sum().item()
    return (hits / len(task.test)).tolist(), of_vote / len(task.test)


EXPERIMENT = Experiment(
    name="ensemble",
    title="Prompt ensembling",
    source="Lester et al. 2021, section 6 and table 3",
    lines=(MEAN, BEST, VOTE),
    rows=rows,
)
