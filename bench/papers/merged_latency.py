"""What an adapter costs in a forward pass: beside the base model, and merged into it."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Iterator, Sequence

import torch
from torch import nn

import peftk
from bench.measure import interleave
from bench.papers.candidates import Candidate
from bench.papers.run import Bench, Experiment, Line, Row

SHAPES = ((1, 1), (1, 128), (4, 128))  # (texts, tokens of each)
ROUNDS = {False: 20, True: 2}  # of a pass of each model in turn; quick: two
BASE, MERGED, BESIDE = "base model", "adapter merged", "adapter beside"
GOAL = 1.03  # of the base model's time

# Nothing is trained: the adapter's B is drawn, so that neither factor is zero.
LORA = Candidate("define", "LoRA", 0.0, 0, (("r", 16),))


def rows(bench: Bench, experiment: Experiment, seed: int) -> Iterator[Row]:
    """Times of the three models, each with weights of its own, taken in turn."""
    start = time.perf_counter()
    models = three(bench, seed)
    count = sum(p.numel() for p in peftk.trainable_parameters(models[BESIDE]))
    generator = torch.Generator().manual_seed(seed)
    for texts, tokens in SHAPES:
        vocabulary = models[BASE].get_input_embeddings().weight.shape[0]
        ids = torch.randint(vocabulary, (texts, tokens), generator=generator)
        with torch.no_grad():
            passes = [functools.partial(model, input_ids=ids, use_cache=False) for model in models.values()]
            times = interleave(passes, ROUNDS[bench.quick])
        for name, seconds in zip(models, times, strict=True):
            line = next(line for line in experiment.lines if line.name == label(name, texts, tokens))
            of = 0 if name == BASE else count
            yield Row(
                line, seed, f"ms, {texts} x {tokens}", statistics.median(seconds) * 1e3, None, of, time.perf_counter() - start
            )


def three(bench: Bench, seed: int) -> dict[str, nn.Module]:
    """By name the model alone, with a merged adapter, and with the same adapter beside it."""
    config, task = LORA.prepare(bench.task(LORA.task))
    base = task.fresh(seed)
    beside = peftk.attach(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in beside.named_parameters():
            if "lora_B" in path:
                parameter.normal_(std=1e-3, generator=generator)
    return {BASE: base.eval(), MERGED: peftk.merge(copy.deepcopy(beside)).eval(), BESIDE: beside.eval()}


def label(name: str, texts: int, tokens: int) -> str:
    """A line's name."""
    return f"{name}, {texts} x {tokens}"


def conclusion(rows: Sequence[Row]) -> str:
    """By shape the merged model's time, and that of the one with its adapter beside, over the base model's."""

    def median(name: str, shape: tuple[int, int]) -> float:
        return statistics.median(row.score for row in rows if row.line.name == label(name, *shape))

    told, missed = [], False
    for shape in SHAPES:
        merged, beside = (median(name, shape) / median(BASE, shape) for name in (MERGED, BESIDE))
        missed |= merged > GOAL
        told.append(f"{shape[0]} x {shape[1]}: merged {merged:.3f}x, beside {beside:.3f}x")
    return f"Of the base model's time: {'; '.join(told)}. Goal for merged <= {GOAL:g}x: {'missed' if missed else 'met'}."


EXPERIMENT = Experiment(
    name="merged_latency",
    title="Latency of a merged adapter",
    source="Hu et al. 2021, section 3 and table 1",
    lines=tuple(Line(label(name, *shape), LORA) for shape in SHAPES for name in (BASE, MERGED, BESIDE)),
    rows=rows,
    conclusion=conclusion,
)
