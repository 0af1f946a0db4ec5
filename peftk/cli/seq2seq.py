"""From a text or a recording to a text: what is read, encoded, measured and answered.

{"source": ..., "target": ...}            models that read (T5, BART and their kin)
{"audio": "file.wav", "target": ...}      models that hear (Whisper); a path counts from the file's own folder
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftk.cli.audio import read_wave
from peftk.cli.continuation import drawing
from peftk.cli.errors import UserError, require
from peftk.cli.examples import Examples, LabelLoss, Row, check_targets, padded, split_records
from peftk.cli.jsonl import read_records, text_of
from peftk.cli.labelled import model_inputs
from peftk.cli.loss import IGNORED
from peftk.cli.metrics import exact_match, word_error_rate
from peftk.cli.training import on_device

logger = logging.getLogger("peftk.cli")
HEARS = "whisper"  # transformers' model_type
RATE, HOP = 16_000, 160  # Hz, and samples a frame (Radford et al. 2022, section 2.2); the encoder halves the frames


@dataclass(frozen=True)
class Pair:
    """What is given and what is to be said; ``where`` it stands, for messages."""

    source: str | Path  # a path: a recording
    target: str
    where: str

    @property
    def key(self) -> str:
        return str(self.source)


def read_pairs(paths: Sequence[Path]) -> list[Pair]:
    """Every record of the files. UserError names the file, the line and the key."""
    pairs = []
    for path in paths:
        for where, record in read_records(path, '"source" or "audio", and "target"'):
            if ("source" in record) == ("audio" in record):
                raise UserError(
                    f"{where}: expected one of the keys 'source' and 'audio', got {', '.join(map(repr, record)) or 'none'}"
                )
            is_audio = "audio" in record
            given = text_of(record, "audio" if is_audio else "source", where)
            pairs.append(Pair(path.parent / given if is_audio else given, text_of(record, "target", where), where))
    return pairs


def encode(
    records: Sequence[Pair], tokenizer: Any, model: nn.Module, length: int, eval_fraction: float, seed: int
) -> tuple[Examples, Examples]:
    """(training, held-out) examples of at most ``length`` tokens on either side."""
    side = side_of(model, tokenizer, length)
    for record in records:
        if isinstance(record.source, Path) != side.hears:
            needs, got = ("'audio', since the model hears", "'source'") if side.hears else ("'source', since it reads", "'audio'")
            raise UserError(f"{record.where}: expected {needs}, got {got}")
    train, held_out = (
        Examples([side.row(record) for record in part], side.batch) for part in split_records(records, eval_fraction, seed)
    )
    if side.cut:
        logger.warning("%d of %d records are longer than --seq-len %d and were cut", side.cut, len(records), length)
    check_targets(train, held_out, length, eval_fraction)
    return train, held_out


def side_of(model: nn.Module, tokenizer: Any, length: int) -> Reading | Hearing:
    """How records become rows for this model."""
    return (Hearing if model.config.model_type == HEARS else Reading)(model.config, tokenizer, length)


class Reading:
    """Texts for a model with an encoder of tokens."""

    hears = False

    def __init__(self, config: Any, tokenizer: Any, length: int):
        self.tokenizer, self.length = tokenizer, length
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.opening = [config.decoder_start_token_id]  # what the decoder is given before the target
        self.cut = 0  # records so far that were too long

    def row(self, record: Pair) -> Row:
        """The source's ids and mask, with the target's."""
        inputs, was_cut = model_inputs(self.tokenizer, self.length, record.source, None)
        inputs.pop("token_type_ids", None)
        row = {**inputs, **self.said(self.tokenizer(text_target=record.target, verbose=False)["input_ids"])}
        self.cut += was_cut and len(row["labels"]) < self.length
        return row

    def said(self, ids: list[int]) -> Row:
        """Ids of a target as labels, and as what the decoder is given: one later, behind the opening. The end belongs to it."""
        end = self.tokenizer.eos_token_id
        ids = ids if ids[-1:] == [end] else [*ids, end]
        given = [*self.opening, *ids[:-1]]
        labels = [IGNORED] * (len(self.opening) - 1) + ids
        self.cut += len(labels) > self.length
        return {"decoder_input_ids": given[: self.length], "labels": labels[: self.length]}

    def batch(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Rows as tensors."""
        return padded(rows, self.pad)

    def inputs(self, given: str) -> dict[str, torch.Tensor]:
        """Of one text, what ``generate`` takes."""
        row, _ = model_inputs(self.tokenizer, self.length, given, None)
        row.pop("token_type_ids", None)
        return {name: torch.tensor([ids]) for name, ids in row.items()}


class Hearing(Reading):
    """Recordings for Whisper. Its features are made batch by batch: those of all would take a megabyte each."""

    hears = True

    def __init__(self, config: Any, tokenizer: Any, length: int):
        super().__init__(config, tokenizer, length)
        self.seconds = config.max_source_positions * 2 * HOP / RATE
        self.features = require("transformers", "hf").WhisperFeatureExtractor(
            feature_size=config.num_mel_bins, sampling_rate=RATE, hop_length=HOP, chunk_length=int(self.seconds)
        )
        self.opening = list(getattr(tokenizer, "prefix_tokens", None) or self.opening)  # no time stamps

    def row(self, record: Pair) -> Row:
        """The recording's path, which is read to see that it can be, with the target's ids. Whisper says a blank first."""
        read_wave(record.source, RATE, self.seconds, record.where)
        ids = self.tokenizer(" " + record.target.strip(), add_special_tokens=False, verbose=False)["input_ids"]
        return {"audio": record.source, **self.said(ids)}

    def batch(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Rows as tensors; input_features (b, mel bins, frames) fp32."""
        ids = padded([{name: values for name, values in row.items() if name != "audio"} for row in rows], self.pad)
        return {"input_features": self._heard([row["audio"] for row in rows], "--data"), **ids}

    def inputs(self, given: str) -> dict[str, torch.Tensor]:
        """Of one recording, what ``generate`` takes."""
        return {"input_features": self._heard([Path(given)], "--audio")}

    def _heard(self, paths: Sequence[Path], where: str) -> torch.Tensor:
        waves = [read_wave(path, RATE, self.seconds, where).numpy() for path in paths]
        return self.features(waves, sampling_rate=RATE, return_tensors="pt").input_features


@torch.no_grad()
def said(side: Reading, model: nn.Module, inputs: dict[str, torch.Tensor], **options: Any) -> list[str]:
    """What the model says to a batch of inputs. ``options``: of transformers' ``generate``, greedy without any."""
    transformers = require("transformers", "hf")
    inputs = {n: v for n, v in inputs.items() if n in ("input_ids", "attention_mask", "input_features")}
    batch = len(next(iter(inputs.values())))
    opening = torch.tensor([side.opening] * batch, device=model.device)
    # Whisper's own generate, for recordings of any length, would look for a language and for time stamps.
    ids = transformers.GenerationMixin.generate(
        model,
        **on_device(inputs, model.device),
        decoder_input_ids=opening,
        **{"do_sample": False, "num_beams": 1, "pad_token_id": side.pad, "eos_token_id": side.tokenizer.eos_token_id, **options},
    )
    return [text.strip() for text in side.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def measure(loss: LabelLoss, data: Examples, arguments: argparse.Namespace, tokenizer: Any) -> dict[str, float]:
    """Word error rate and share of exact matches of what is said greedily to the first --eval-generate examples, at most twice
    the longest target's tokens; empty for none."""
    side = side_of(loss.model, tokenizer, arguments.seq_len)
    heard: list[str] = []
    expected: list[str] = []
    count = min(arguments.eval_generate, len(data))
    longest = max((len(data.rows[i]["labels"]) for i in range(count)), default=0)
    for i in range(0, count, arguments.batch_size):
        batch = data.batch(list(range(i, min(i + arguments.batch_size, count))))
        batch = {n: v.to(loss.dtype) if v.is_floating_point() else v for n, v in batch.items()}
        heard += said(side, loss.model, batch, max_new_tokens=2 * longest)
        for labels in batch["labels"]:
            expected.append(tokenizer.decode(labels[labels != IGNORED], skip_special_tokens=True).strip())
    if not expected:
        return {}
    return {"wer": word_error_rate(heard, expected), "exact_match": exact_match(heard, expected)}


def answer(model: nn.Module, tokenizer: Any, arguments: argparse.Namespace) -> str:
    """What the model says to --prompt or --audio."""
    side = side_of(model, tokenizer, _longest(model))
    needed, given, other = ("--audio", arguments.audio, "--prompt") if side.hears else ("--prompt", arguments.prompt, "--audio")
    if given is None:
        raise UserError(f"{needed} is needed: a {type(model).__name__} {'hears' if side.hears else 'reads'}; got {other}")
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    inputs = {n: v.to(dtype) if v.is_floating_point() else v for n, v in side.inputs(str(given)).items()}
    return said(side, model, inputs, **drawing(arguments))[0]


def _longest(model: nn.Module) -> int:
    return getattr(model.config, "max_position_embeddings", None) or 1 << 30
