"""How a task is tuned: a method, its options, and the steps. A method is one entry of METHODS and knows no task's kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peftk

Prepared = tuple[Any, Any]  # (a config to attach or None, the task, perhaps with other inputs)


@dataclass(frozen=True)
class Candidate:
    """One line of an experiment. Equal ones are trained once, whatever they are called."""

    task: str
    method: str
    rate: float
    steps: int
    options: tuple[tuple[str, Any], ...] = ()
    batch: int = 16

    def prepare(self, task: Any) -> Prepared:
        """The config, and the task as the method sees it."""
        return METHODS[self.method](task, **dict(self.options))


def _hard(task: Any) -> Prepared:
    return None, task


def _prompt(task: Any, n: int, init: str = "SAMPLE_VOCAB", text: str | None = None) -> Prepared:
    labels = list(task.verbalizer.labels) if init == "CLASS_LABELS" else None
    facts = {"prompt_tuning_init_text": text, "class_labels": labels, "tokenizer": task.tokenizer}
    return peftk.PromptTuningConfig(num_virtual_tokens=n, prompt_tuning_init=init, **facts), task


def _p_tuning(task: Any, encoder: str, from_words: bool = True) -> Prepared:
    words = task.template.word_ids
    where = {"placeholder_token_id": task.placeholder, "num_virtual_tokens": len(words)}
    start = {"init_token_ids": words if from_words else None}
    return peftk.PTuningConfig(encoder_reparameterization_type=encoder, **where, **start), task.softened()


def _prefix(task: Any, n: int, variant: str = "prefix", mlp: bool = False, zero: bool = False) -> Prepared:
    facts = {"prefix_projection": mlp, "encoder_hidden_size": 512 if mlp else None, "init_weights": "zero" if zero else None}
    infix = task.separator if variant == "infix" else None
    return peftk.PrefixTuningConfig(num_virtual_tokens=n, variant=variant, infix_token_id=infix, **facts), task


def _p_tuning_v2(task: Any, n: int, mlp: bool = False) -> Prepared:
    return peftk.PTuningV2Config(num_virtual_tokens=n, prefix_projection=mlp), task


METHODS: dict[str, Callable[..., Prepared]] = {
    "hard template": _hard,
    "prompt tuning": _prompt,
    "P-Tuning": _p_tuning,
    "prefix tuning": _prefix,
    "P-Tuning v2": _p_tuning_v2,
}
