from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from task_models import word_tokenizer

from peftk.cli.errors import UserError
from peftk.cli.labelled import Text, Words, classes, encode, read_texts, read_words, word_pieces
from peftk.cli.loss import IGNORED


def write(path, *lines):
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def model(*names, takes=lambda input_ids, token_type_ids: None):
    return SimpleNamespace(config=SimpleNamespace(label2id={name: i for i, name in enumerate(names)}), forward=takes)


def test_texts_pairs_and_numbers_as_labels(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a", "label": "x"}, {"text": "b", "text_pair": "c", "label": 3})
    assert read_texts([path]) == [Text("a", None, "x"), Text("b", "c", "3")]
    assert classes([Text("a", None, "x"), Text("b", None, "O"), Text("c", None, "k")]) == ["O", "k", "x"]


@pytest.mark.parametrize(
    ("read", "record", "message"),
    [
        (read_texts, {"text": "a"}, "line 2: missing key 'label'"),
        (read_texts, {"text": "a", "label": True}, "line 2: 'label': expected text, got bool"),
        (read_texts, {"text": "  ", "label": "x"}, "line 2: 'text' is empty"),
        (read_texts, {"text": "a", "text_pair": 1, "label": "x"}, "line 2: 'text_pair': expected text, got int"),
        (read_texts, ["a"], 'line 2: expected an object with "text" and "label", got list'),
        (read_words, {"tokens": "a b", "tags": ["x"]}, "line 2: 'tokens': expected a list of texts"),
        (read_words, {"tokens": ["a", ""], "tags": ["x", "y"]}, r"line 2: tokens\[1\]: expected text"),
        (read_words, {"tokens": ["a", "b"], "tags": ["x"]}, "line 2: expected a tag for each token, got 2 tokens and 1 tags"),
    ],
)
def test_a_bad_record_is_told_by_line_and_key(tmp_path, read, record, message):
    good = {"text": "a", "label": "x"} if read is read_texts else {"tokens": ["a"], "tags": ["x"]}
    with pytest.raises(UserError, match=message):
        read([write(tmp_path / "a.jsonl", good, record)])


def test_a_tag_is_learned_at_the_first_piece(tokenizer):
    """A byte-level tokenizer counts blanks to the words behind; one word is several pieces; one is dropped by the other."""
    words = ["the", "zebra", "was", "at", "ön"]
    row, places, was_cut = word_pieces(words, tokenizer, 99)
    pieces = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert [pieces[places[i]].lstrip("Ġ")[:1] for i in range(4)] == ["t", "z", "w", "a"] and not was_cut
    assert len(places) == 5 and len(pieces) > 6 and sorted(places.values()) == list(places.values())
    train, _ = encode([Words(tuple(words), ("O", "X", "O", "O", "Y"))], tokenizer, model("O", "X", "Y"), 99, 0.0, 0)
    labels = train.rows[0]["labels"]
    assert [labels[places[i]] for i in range(5)] == [0, 1, 0, 0, 2] and sum(label != IGNORED for label in labels) == 5


def test_a_word_beyond_the_cut_has_no_place(caplog):
    words = ("a", "bird", "unfish", ".")
    row, places, was_cut = word_pieces(words, word_tokenizer(), 5)
    assert row["input_ids"][0] == 2 and row["input_ids"][-1] == 3 and len(row["input_ids"]) == 5
    assert places == {0: 1, 1: 2, 2: 3} and was_cut
    with caplog.at_level(logging.WARNING, "peftk.cli"):
        encode([Words(words, ("O", "X", "O", "O"))], word_tokenizer(), model("O", "X"), 5, 0.0, 0)
    assert "1 of 1 records are longer than --seq-len 5" in caplog.text


def test_batches_are_padded_to_their_longest_and_split_by_text():
    records = [
        Text("a bird", None, "x"),
        Text("a bird", None, "y"),
        Text("green moss near", "a fish", "x"),
        Text("oak", None, "y"),
    ]
    train, held_out = encode(records, word_tokenizer(padding=True), model("x", "y"), 20, 0.3, 1)
    assert len(train) + len(held_out) == 4 and train.targets == len(train)
    everything, nothing = encode(records, word_tokenizer(padding=True), model("x", "y"), 20, 0.0, 1)
    batch = everything.batch([0, 2])
    assert len(nothing) == 0 and batch["input_ids"].shape == (2, 8) and batch["labels"].tolist() == [0, 0]
    assert batch["attention_mask"].tolist()[0] == [1, 1, 1, 1, 0, 0, 0, 0] and batch["token_type_ids"][1].sum() == 3
    assert everything.tokens([0, 2]) == 12 and everything.count([0, 2]) == 2
    untyped, _ = encode(records, word_tokenizer(), model("x", "y", takes=lambda input_ids: None), 20, 0.0, 1)
    assert "token_type_ids" not in untyped.rows[0]
    twins = {tuple(row["input_ids"]) for row in train.rows} & {tuple(row["input_ids"]) for row in held_out.rows}
    assert not twins  # one text with two labels lies on one side
    assert torch.equal(batch["input_ids"][0, 4:], torch.zeros(4, dtype=torch.int64))
