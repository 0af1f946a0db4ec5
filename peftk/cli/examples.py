"""Records as batches: what tasks other than language modelling train on, one row a record, padded to the longest of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from peftk.cli.errors import UserError
from peftk.cli.loss import IGNORED
from peftk.cli.packing import held_out_keys
from peftk.methods.prompts import parameters_of

Row = dict[str, Any]  # by the model's names: lists of ids, "labels" a list or a class; what else ``collate`` knows
_IDS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class Examples:
    """Encoded records. ``collate`` makes a batch of some rows."""

    rows: Sequence[Row]
    collate: Callable[[Sequence[Row]], dict[str, torch.Tensor]]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def targets(self) -> int:
        """Labels that the loss is taken on."""
        return sum(map(_targets, self.rows))

    def count(self, rows: Sequence[int]) -> int:
        """The same, of some rows."""
        return sum(_targets(self.rows[i]) for i in rows)

    def tokens(self, rows: Sequence[int]) -> int:
        """Of some rows, padding left out."""
        return sum(len(self.rows[i].get(name, ())) for i in rows for name in _IDS)

    def batch(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Those rows as tensors."""
        return self.collate([self.rows[i] for i in rows])


def _targets(row: Row) -> int:
    labels = row["labels"]
    return 1 if isinstance(labels, int) else sum(label != IGNORED for label in labels)


def padded(rows: Sequence[Row], pad: int) -> dict[str, torch.Tensor]:
    """int64 tensors (b,) of numbers and (b, longest) of lists, filled on the right: ids with ``pad``, labels with IGNORED, masks
    and types with 0."""
    fillers = {"labels": IGNORED, **dict.fromkeys(_IDS, pad)}
    batch = {}
    for name in rows[0]:
        values = [torch.tensor(row[name]) for row in rows]
        batch[name] = (
            torch.stack(values)
            if values[0].dim() == 0
            else nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fillers.get(name, 0))
        )
    return batch


def split_records(records: Sequence[Any], eval_fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(training, held-out) records; those with the same ``key`` lie on one side. UserError where there are too few."""
    if not eval_fraction:
        return list(records), []
    chosen = held_out_keys([record.key for record in records], eval_fraction, seed)
    return [r for r in records if r.key not in chosen], [r for r in records if r.key in chosen]


def check_targets(train: Examples, held_out: Examples, length: int, eval_fraction: float) -> None:
    """UserError where nothing is left to learn from, or to measure on."""
    if not train.targets:
        raise UserError(f"--data: no label to learn from within --seq-len {length}: raise it, or shorten the inputs")
    if eval_fraction and not held_out.targets:
        raise UserError(f"--eval-fraction {eval_fraction}: holds out no label to measure on; give more data, or 0")


class LabelLoss:
    """Cross-entropy of a model's logits, (b, classes) or (b, l, classes), with the batch's labels: a sum in fp32.

    Of logits that are longer than the labels, since virtual tokens stand in front, the last count.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.options = {"use_cache": False} if "use_cache" in parameters_of(model) else {}

    def __call__(self, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        logits = self.logits(labels, inputs)
        return functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")

    def logits(self, labels: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """One row of logits a label."""
        inputs = {name: values.to(self.dtype) if values.is_floating_point() else values for name, values in inputs.items()}
        logits = self.model(**inputs, **self.options).logits
        return logits[:, -labels.shape[1] :] if labels.dim() == 2 else logits
