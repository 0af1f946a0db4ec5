"""Documents in sequences of one length, and a split that shares no token between training and held-out text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftk.cli.data import Document
from peftk.cli.errors import UserError
from peftk.cli.loss import IGNORED, count_targets

logger = logging.getLogger("peftk.cli")


@dataclass(frozen=True)
class Sequences:
    """input_ids and labels (n, length) int64; n may be 0."""

    input_ids: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def targets(self) -> int:
        """Tokens that the loss is taken on."""
        return count_targets(self.labels)

    def count(self, rows: Sequence[int]) -> int:
        """The same, of some rows."""
        return count_targets(self.labels[rows])

    def tokens(self, rows: Sequence[int]) -> int:
        """That go through the model for some rows, padding included."""
        return len(rows) * self.input_ids.shape[1]

    def batch(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Those rows, as the loss takes them."""
        return {"input_ids": self.input_ids[rows], "labels": self.labels[rows]}


def split_and_pack(
    documents: Sequence[Document], length: int, eval_fraction: float, seed: int, pad: int
) -> tuple[Sequences, Sequences]:
    """(training, held-out) sequences. UserError where there is too little text for one sequence of each.

    The held-out part of a text is its end; of records, a random share (a record that occurs twice lies on one side).
    """
    train, held_out = split(documents, eval_fraction, seed)
    tokens = sum(len(document.input_ids) for document in train)
    if tokens < length and not any(document.is_record for document in train):
        raise UserError(
            f"--data: {tokens} tokens to train on do not fill one sequence of --seq-len {length}: lower it, or give more text"
        )
    packed_train, packed_held_out = pack(train, length, pad), pack(held_out, length, pad)
    if not packed_train.targets:
        raise UserError(f"--data: no token to learn from within --seq-len {length}: raise it")
    if eval_fraction and not packed_held_out.targets:
        raise UserError(f"--eval-fraction {eval_fraction}: holds out no token to measure on; give more data, or 0")
    return packed_train, packed_held_out


def split(documents: Sequence[Document], eval_fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents."""
    train: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        if document.is_record or not eval_fraction:
            continue
        cut = len(document.input_ids) - max(2, round(eval_fraction * len(document.input_ids)))
        for part, side in ((slice(None, cut), train), (slice(cut, None), held_out)):
            side.append(Document(document.input_ids[part], document.labels[part], is_record=False))
    if not eval_fraction:
        return list(documents), []
    records = [document for document in documents if document.is_record]
    if records:
        chosen = held_out_keys([tuple(record.input_ids) for record in records], eval_fraction, seed)
        for record in records:
            (held_out if tuple(record.input_ids) in chosen else train).append(record)
    return train, held_out


def held_out_keys(keys: Sequence[Any], eval_fraction: float, seed: int) -> set[Any]:
    """A random share of the distinct keys, at least one and not all. UserError where there is only one."""
    distinct = sorted(set(keys))
    if len(distinct) == 1:
        raise UserError("--eval-fraction: one record can't be split into training and held-out text; give 0")
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(1, round(eval_fraction * len(distinct))), len(distinct) - 1)
    return {distinct[i] for i in order[:count]}


def pack(documents: Sequence[Document], length: int, pad: int) -> Sequences:
    """Texts run on from one sequence into the next; a record is kept whole in the first sequence with room for it and cut
    only where it is longer than one. What stays empty is filled with ``pad`` and carries no loss."""
    rows = _chop([d for d in documents if not d.is_record], length) + _fit([d for d in documents if d.is_record], length)
    input_ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    for i, (row_ids, row_labels) in enumerate(rows):
        input_ids[i, : len(row_ids)] = torch.tensor(row_ids)
        labels[i, : len(row_labels)] = torch.tensor(row_labels)
    learnable = (labels[:, 1:] != IGNORED).any(1)
    return Sequences(input_ids[learnable], labels[learnable])


Row = tuple[list[int], list[int]]


def _chop(texts: Sequence[Document], length: int) -> list[Row]:
    ids = [token for text in texts for token in text.input_ids]
    labels = [label for text in texts for label in text.labels]
    return [(ids[i : i + length], labels[i : i + length]) for i in range(0, len(ids), length)]


def _fit(records: Sequence[Document], length: int) -> list[Row]:
    rows: list[Row] = []
    open_rows: list[int] = []
    shortest = min((len(record.input_ids) for record in records), default=0)
    cut = 0
    for record in records:
        ids, labels = record.input_ids[:length], list(record.labels[:length])
        cut += len(record.input_ids) > length
        labels[0] = IGNORED  # its predecessor is another record's last token
        place = next((i for i in open_rows if len(rows[i][0]) + len(ids) <= length), None)
        if place is None:
            place = len(rows)
            rows.append(([], []))
            open_rows.append(place)
        rows[place][0].extend(ids)
        rows[place][1].extend(labels)
        if len(rows[place][0]) + shortest > length:
            open_rows.remove(place)
    if cut:
        logger.warning("%d of %d records are longer than --seq-len %d and were cut", cut, len(records), length)
    return rows


def batch_order(n: int, first: int, count: int, seed: int) -> list[int]:
    """Which sequences come as samples first, first + 1, ... of an endless stream; each pass over the n is shuffled anew."""
    chosen: list[int] = []
    orders: dict[int, list[int]] = {}
    for position in range(first, first + count):
        epoch, i = divmod(position, n)
        if epoch not in orders:
            orders[epoch] = torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        chosen.append(orders[epoch][i])
    return chosen
