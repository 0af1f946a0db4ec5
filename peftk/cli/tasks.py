"""The tasks that ``peftk finetune`` knows: what is read, encoded, lost, measured and answered. A new one is an entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from peftk.cli import continuation, labelled, seq2seq
from peftk.cli.examples import LabelLoss
from peftk.cli.loss import LanguageModelLoss
from peftk.cli.training import Data, Loss


@dataclass(frozen=True)
class Task:
    """``read``: files -> records; ``labels``: the classes among these, None for a task without; ``encode``: (records, tokenizer,
    model, longest, share held out, seed) -> (training, held-out) data; ``measure``: (loss, held-out data, arguments, tokenizer)
    -> metrics; ``answer``: (model, tokenizer, arguments of ``peftk generate``) -> what it prints."""

    task_type: str  # HF peft's
    about: str
    unit: str  # of targets
    rows: str  # what is trained on
    read: Callable[[Sequence[Path]], Sequence[Any]]
    labels: Callable[[Sequence[Any]], list[str]] | None
    encode: Callable[..., tuple[Data, Data]]
    loss: Callable[[nn.Module], Loss]
    metrics: tuple[str, ...]
    measure: Callable[..., dict[str, float]]
    answer: Callable[..., str]


def no_metrics(*_: Any) -> dict[str, float]:
    """Of a task whose loss says it all."""
    return {}


TASKS = {
    "causal-lm": Task(
        "CAUSAL_LM",
        "go on with a text",
        "token",
        "sequences",
        list,
        None,
        continuation.encode,
        LanguageModelLoss,
        (),
        no_metrics,
        continuation.answer,
    ),
    "seq2seq": Task(
        "SEQ_2_SEQ_LM",
        "a text, or speech, to a text",
        "token",
        "records",
        seq2seq.read_pairs,
        None,
        seq2seq.encode,
        LabelLoss,
        ("wer", "exact_match"),
        seq2seq.measure,
        seq2seq.answer,
    ),
    "classification": Task(
        "SEQ_CLS",
        "a class for a text",
        "label",
        "records",
        labelled.read_texts,
        labelled.classes,
        labelled.encode,
        LabelLoss,
        ("accuracy", "macro_f1"),
        labelled.measure_texts,
        labelled.answer_text,
    ),
    "token-classification": Task(
        "TOKEN_CLS",
        "a tag for each word",
        "label",
        "records",
        labelled.read_words,
        labelled.classes,
        labelled.encode,
        LabelLoss,
        ("token_f1",),
        labelled.measure_words,
        labelled.answer_words,
    ),
}
