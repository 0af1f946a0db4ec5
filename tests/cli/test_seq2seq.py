from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from task_models import tone, word_tokenizer, write_wave

from peftk.cli.errors import UserError
from peftk.cli.loss import IGNORED
from peftk.cli.seq2seq import Hearing, Pair, Reading, encode, read_pairs

CONFIG = SimpleNamespace(decoder_start_token_id=7, model_type="t5", max_source_positions=50, num_mel_bins=8)


def test_a_target_is_given_one_later_and_ends(tokenizer):
    side = Reading(CONFIG, tokenizer, 30)
    row = side.row(Pair("the man", "was", "here"))
    ids = tokenizer("was").input_ids
    assert row["labels"] == [*ids, tokenizer.eos_token_id] and row["decoder_input_ids"] == [7, *ids]
    assert side.said([5, tokenizer.eos_token_id])["labels"] == [5, tokenizer.eos_token_id]  # not twice


def test_what_the_decoder_is_opened_with_is_not_learned(tokenizer, tmp_path):
    write_wave(tmp_path / "a.wav", tone(300))
    tokenizer.prefix_tokens = [7, 8]
    try:
        side = Hearing(CONFIG, tokenizer, 30)
    finally:
        del tokenizer.prefix_tokens
    row = side.row(Pair(tmp_path / "a.wav", " was ", "here"))
    ids = tokenizer(" was").input_ids
    assert row["decoder_input_ids"] == [7, 8, *ids] and row["labels"] == [IGNORED, *ids, tokenizer.eos_token_id]
    batch = side.batch([row, {**row, "decoder_input_ids": [7], "labels": [1]}])
    assert batch["input_features"].shape == (2, 8, 100)
    assert batch["labels"][1].tolist() == [1] + [IGNORED] * len(ids + [0])


def test_long_targets_are_cut_on_both_sides(tokenizer):
    side = Reading(CONFIG, tokenizer, 3)
    row = side.row(Pair("the man of the of", "not for it was at on", "here"))
    assert len(row["labels"]) == len(row["decoder_input_ids"]) == len(row["input_ids"]) == 3 and side.cut == 1
    side.row(Pair("the man of the of", "a", "here"))
    assert side.cut == 2


def test_one_of_both_sources(tmp_path):
    path = tmp_path / "a.jsonl"
    for record, message in (
        ({"source": "a", "audio": "b", "target": "c"}, "expected one of the keys 'source' and 'audio'"),
        ({"target": "c"}, "expected one of the keys 'source' and 'audio', got 'target'"),
        ({"source": "a"}, "missing key 'target'"),
        ({"source": 1, "target": "c"}, "'source': expected text, got int"),
    ):
        path.write_text(json.dumps(record))
        with pytest.raises(UserError, match=f"line 1: {message}"):
            read_pairs([path])
    path.write_text(json.dumps({"audio": "b.wav", "target": "c"}))
    assert read_pairs([path])[0].source == tmp_path / "b.wav"


def test_a_recording_that_is_not_there_is_told_by_its_line(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"audio": "b.wav", "target": "c"}))
    heard = SimpleNamespace(config=SimpleNamespace(**{**vars(CONFIG), "model_type": "whisper"}))
    with pytest.raises(UserError, match="a.jsonl line 1: .*b.wav: no such file"):
        encode(read_pairs([path]), tokenizer, heard, 9, 0.0, 0)


def test_types_are_left_out():
    assert set(Reading(CONFIG, word_tokenizer(), 9).inputs("a bird")) == {"input_ids", "attention_mask"}
