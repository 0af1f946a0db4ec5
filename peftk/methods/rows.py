"""Another adapter in every row of a batch, and the vote of several prompts (Lester et al. 2021, section 6)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftk.methods.adapter import BASE
from peftk.methods.attach import attached, wrappers


@contextlib.contextmanager
def adapters_per_row(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside the ``with`` row i of a batch is computed with the adapter ``names[i]`` alone, "__base__" for none; the active ones
    count no more. A batch that is k times as long, as beams and samples make it, has k rows for each name.

    Which adapters are trained stays as ``set_adapter`` said; with gradient checkpointing the backward pass belongs inside too, as
    it computes layers again. ValueError: an unknown name; an adapter that is merged, so that
    every row has it; one that trains biases of the base, which all rows share.
    """
    state = attached(model)
    if isinstance(names, str) or not len(names):
        raise ValueError(f"names: expected a list with a name for each row, got {names!r}")
    names = list(names)
    if unknown := sorted({repr(name) for name in names if name != BASE and name not in state.configs}):
        raise ValueError(f"names: no adapter called {', '.join(unknown)}; attached are {', '.join(state.configs)}")
    if state.merged:
        raise ValueError(
            f"names: expected a model without merged adapters, got one with {', '.join(state.merged)}; unmerge first"
        )
    if state.biases is not None:
        raise ValueError(
            f"names: expected adapters that leave the base's biases alone, got {state.biases.owner!r}, which trains them"
        )
    before = [(wrapper, wrapper.rows) for _, wrapper in wrappers(model)]
    for wrapper, _ in before:
        wrapper.rows = names
    try:
        yield
    finally:
        for wrapper, rows in before:
            wrapper.rows = rows


@dataclass(frozen=True)
class PromptEnsemble:
    """What several prompts say about the same inputs."""

    logits: torch.Tensor  # (prompts, batch, ...): each prompt's
    predictions: torch.Tensor  # (batch, ...): what most of them say; a tie goes to the class with the larger mean probability


def prompt_ensemble(model: nn.Module, names: Sequence[str], **inputs: Any) -> PromptEnsemble:
    """Run the inputs, b rows each, once with every adapter of ``names``, as one batch of len(names) * b rows on the one base.

    Prompts of different lengths are padded, so that in the logits of causal models the last columns belong together, and of
    encoders the first. ValueError: an unknown name, or no tensor among the inputs.
    """
    names = list(names)
    tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
    if not tensors:
        raise ValueError(f"inputs: expected tensors, got {', '.join(inputs) or 'nothing'}")
    batch = tensors[0].shape[0]
    repeated = {
        key: value.repeat(len(names), *[1] * (value.dim() - 1))
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == batch
        else value
        for key, value in inputs.items()
    }
    with adapters_per_row(model, [name for name in names for _ in range(batch)]):
        logits = model(**repeated).logits
    logits = logits.unflatten(0, (len(names), batch))
    return PromptEnsemble(logits, _vote(logits))


def _vote(logits: torch.Tensor) -> torch.Tensor:
    """(prompts, ..., classes) -> (...)"""
    chosen = logits.argmax(-1, keepdim=True)
    mean = logits.detach().float().softmax(-1).mean(0)
    votes = torch.zeros_like(mean)
    for one in chosen:
        votes.scatter_add_(-1, one, torch.ones_like(one, dtype=votes.dtype))
    return (votes + mean / 2).argmax(-1)  # half a probability is less than a vote
