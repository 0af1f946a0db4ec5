"""Texts with a class, and words with a tag each: what is read, encoded, measured and answered.

classification          {"text": ..., "label": ...}, and "text_pair" where a class is about two texts
token-classification    {"tokens": [...], "tags": [...]}; a word's tag is learned and asked for at its first piece
"""

from __future__ import annotations

import argparse
import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftk.cli.errors import UserError
from peftk.cli.examples import Examples, LabelLoss, Row, check_targets, padded, split_records
from peftk.cli.jsonl import read_records, text_of, texts_of
from peftk.cli.loss import IGNORED
from peftk.cli.metrics import accuracy, macro_f1, micro_f1
from peftk.cli.training import on_device
from peftk.methods.prompts import parameters_of

logger = logging.getLogger("peftk.cli")
OUTSIDE = "O"  # the tag of words that are nothing
_TYPES = "token_type_ids"


@dataclass(frozen=True)
class Text:
    """One text, or two, of a class."""

    text: str
    pair: str | None
    label: str

    @property
    def key(self) -> tuple[str, str]:
        return self.text, self.pair or ""


@dataclass(frozen=True)
class Words:
    """Words with a tag each."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]

    @property
    def key(self) -> tuple[str, ...]:
        return self.tokens


def read_texts(paths: Sequence[Path]) -> list[Text]:
    """Every record of the files. UserError names the file, the line and the key."""
    return [
        Text(
            text_of(record, "text", where),
            text_of(record, "text_pair", where) if "text_pair" in record else None,
            _label(record, where),
        )
        for path in paths
        for where, record in read_records(path, '"text" and "label"')
    ]


def read_words(paths: Sequence[Path]) -> list[Words]:
    """Every record of the files. UserError names the file, the line and the key."""
    return [_words(record, where) for path in paths for where, record in read_records(path, '"tokens" and "tags"')]


def _label(record: dict[str, Any], where: str) -> str:
    """A class is a name; a whole number is taken for one."""
    value = record.get("label")
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text_of(record, "label", where)


def _words(record: dict[str, Any], where: str) -> Words:
    tokens, tags = texts_of(record, "tokens", where), texts_of(record, "tags", where)
    if len(tokens) != len(tags):
        raise UserError(f"{where}: expected a tag for each token, got {len(tokens)} tokens and {len(tags)} tags")
    return Words(tuple(tokens), tuple(tags))


def classes(records: Sequence[Text | Words]) -> list[str]:
    """The names that occur, in order; OUTSIDE first. UserError where there is nothing to tell apart."""
    found = {name for r in records for name in ([r.label] if isinstance(r, Text) else r.tags)}
    if len(found) < 2:
        raise UserError(f"--data: expected at least two classes, got {', '.join(map(repr, found))}")
    return sorted(found, key=lambda name: (name != OUTSIDE, name))


def encode(
    records: Sequence[Text | Words], tokenizer: Any, model: nn.Module, length: int, eval_fraction: float, seed: int
) -> tuple[Examples, Examples]:
    """(training, held-out) examples of at most ``length`` tokens, by the model's own numbers of the classes."""
    numbers = model.config.label2id
    one = _encoded_words if isinstance(records[0], Words) else _encoded_text
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    parts = []
    cut = 0
    for part in split_records(records, eval_fraction, seed):
        encoded = [one(record, tokenizer, numbers, length) for record in part]
        cut += sum(was_cut for _, was_cut in encoded)
        parts.append(Examples([_taken(row, model) for row, _ in encoded], partial(padded, pad=pad)))
    if cut:
        logger.warning("%d of %d records are longer than --seq-len %d and were cut", cut, len(records), length)
    check_targets(*parts, length, eval_fraction)
    return parts[0], parts[1]


def _encoded_text(record: Text, tokenizer: Any, numbers: dict[str, int], length: int) -> tuple[Row, bool]:
    row, was_cut = model_inputs(tokenizer, length, record.text, record.pair)
    return {**row, "labels": numbers[record.label]}, was_cut


def _encoded_words(record: Words, tokenizer: Any, numbers: dict[str, int], length: int) -> tuple[Row, bool]:
    row, places, was_cut = word_pieces(record.tokens, tokenizer, length)
    labels = [IGNORED] * len(row["input_ids"])
    for word, place in places.items():
        labels[place] = numbers[record.tags[word]]
    return {**row, "labels": labels}, was_cut


def word_pieces(words: Sequence[str], tokenizer: Any, length: int) -> tuple[Row, dict[int, int], bool]:
    """(the words as one text, encoded; by word, where its first piece stands; whether the text was cut). A word beyond the cut,
    or of characters that the tokenizer drops, has no place."""
    if not tokenizer.is_fast:
        raise UserError(
            "--task token-classification needs a tokenizer that tells each token's place in the text (tokenizer.json)"
        )
    starts = list(accumulate((len(word) + 1 for word in words[:-1]), initial=0))  # with the blank behind
    row, was_cut = model_inputs(tokenizer, length, " ".join(words), None, return_offsets_mapping=True)
    places: dict[int, int] = {}
    for at, (start, stop) in enumerate(row.pop("offset_mapping")):
        if start < stop:  # by its last character: some tokenizers count the blank before a word to its first piece
            places.setdefault(bisect_right(starts, stop - 1) - 1, at)
    return row, places, was_cut


def model_inputs(tokenizer: Any, length: int, text: str, pair: str | None, **options: Any) -> tuple[Row, bool]:
    """(what the tokenizer makes of the texts, at most ``length`` tokens of it; whether it was cut)."""
    row = tokenizer(text, pair, padding=False, truncation=False, verbose=False, **options)
    was_cut = len(row["input_ids"]) > length
    if was_cut:
        row = tokenizer(text, pair, padding=False, truncation=True, max_length=length, **options)
    return dict(row), was_cut


@torch.no_grad()
def predictions(loss: LabelLoss, data: Examples, batch_size: int) -> tuple[list[int], list[int]]:
    """(predicted, expected) class of every label of the data."""
    predicted: list[int] = []
    expected: list[int] = []
    for i in range(0, len(data), batch_size):
        batch = on_device(data.batch(list(range(i, min(i + batch_size, len(data))))), loss.model.device)
        labels = batch.pop("labels")
        chosen = loss.logits(labels, batch).argmax(-1)
        predicted += chosen[labels != IGNORED].tolist()
        expected += labels[labels != IGNORED].tolist()
    return predicted, expected


def measure_texts(loss: LabelLoss, data: Examples, arguments: argparse.Namespace, tokenizer: Any) -> dict[str, float]:
    """Accuracy and the classes' mean F1."""
    predicted, expected = predictions(loss, data, arguments.batch_size)
    return {"accuracy": accuracy(predicted, expected), "macro_f1": macro_f1(predicted, expected)}


def measure_words(loss: LabelLoss, data: Examples, arguments: argparse.Namespace, tokenizer: Any) -> dict[str, float]:
    """Micro-F1 of the tags of single words, without OUTSIDE: not of whole names."""
    predicted, expected = predictions(loss, data, arguments.batch_size)
    return {"token_f1": micro_f1(predicted, expected, loss.model.config.label2id.get(OUTSIDE))}


@torch.inference_mode()
def answer_text(model: nn.Module, tokenizer: Any, arguments: argparse.Namespace) -> str:
    """The classes with their probabilities, the likeliest first."""
    row, _ = model_inputs(tokenizer, _longest(model), arguments.prompt, arguments.pair)
    shares = model(**_one(row, model)).logits[0].float().softmax(-1)
    order = shares.argsort(descending=True).tolist()
    return "\n".join(f"{shares[i]:.3f}  {model.config.id2label[i]}" for i in order)


@torch.inference_mode()
def answer_words(model: nn.Module, tokenizer: Any, arguments: argparse.Namespace) -> str:
    """A line a word: the word, a tab, its tag; ? for what the tokenizer dropped."""
    words = arguments.prompt.split()
    row, places, _ = word_pieces(words, tokenizer, _longest(model))
    chosen = model(**_one(row, model)).logits[0, -len(row["input_ids"]) :].argmax(-1).tolist()
    tags = [model.config.id2label[chosen[places[i]]] if i in places else "?" for i in range(len(words))]
    return "\n".join(f"{word}\t{tag}" for word, tag in zip(words, tags, strict=True))


def _one(row: Row, model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([values], device=model.device) for name, values in _taken(row, model).items()}


def _taken(row: Row, model: nn.Module) -> Row:
    """Without the types, which some tokenizers make for models that know none."""
    return row if _TYPES in parameters_of(model) else {name: values for name, values in row.items() if name != _TYPES}


def _longest(model: nn.Module) -> int:
    return getattr(model.config, "max_position_embeddings", None) or 1 << 30
