"""One prompt against the vote of five on the same frozen model."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

import peftk
from bench.papers.prompt_init import VOCABULARY
from bench.papers.run import Bench, Experiment, Line, Row, train
from bench.papers.tasks import AT_ONCE

VOTES = 5
MEAN, BEST, VOTE = Line("one, their mean", VOCABULARY), Line("one, the best", VOCABULARY), Line("five, a vote", VOCABULARY)


def rows(bench: Bench, experiment: Experiment, seed: int) -> Iterator[Row]:
    """Train VOTES prompts of their own seeds side by side, and let them answer alone and together."""
    start = time.perf_counter()
    config, task = VOCABULARY.prepare(bench.task(VOCABULARY.task))
    model = task.fresh(seed)
    names = [f"prompt{i}" for i in range(VOTES)]
    losses = []
    try:
        for i, name in enumerate(names):
            torch.manual_seed(seed * VOTES + i)
            peftk.attach(model, config, adapter_name=name)
            peftk.set_adapter(model, name)
            losses.append(train(model, task, VOCABULARY, seed * VOTES + i, bench.quick))
        count = sum(parameter.numel() for parameter in peftk.trainable_parameters(model))
        alone, together = answers(model.eval(), task, names)
    finally:
        peftk.detach(model)
    seconds = time.perf_counter() - start
    for line, score in ((MEAN, sum(alone) / VOTES), (BEST, max(alone)), (VOTE, together)):
        yield Row(line, seed, f"{task.metric}, whole vocabulary", score, sum(losses) / VOTES, count, seconds)


@torch.no_grad()
def answers(model: torch.nn.Module, task, names: list[str]) -> tuple[list[float], float]:
    """(each prompt's precision at 1, the vote's), over the whole vocabulary: all prompts in one batch."""
    hits, of_vote = torch.zeros(len(names)), 0.0
    for at in range(0, len(task.test), AT_ONCE):
        batch = task.test[at : at + AT_ONCE]
        right = torch.tensor([answer[0] for _, answer in batch])
        inputs = task.template.inputs([text for text, _ in batch])
        said = peftk.prompt_ensemble(model, names, **inputs, logits_to_keep=1)
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
