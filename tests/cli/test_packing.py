from __future__ import annotations

import logging

import pytest
import torch

from peftk.cli.data import Document
from peftk.cli.errors import UserError
from peftk.cli.loss import IGNORED
from peftk.cli.packing import batch_order, pack, split, split_and_pack

PAD = 0


def text(*ids):
    return Document(list(ids), list(ids), is_record=False)


def record(prompt, completion):
    return Document(prompt + completion, [IGNORED] * len(prompt) + completion, is_record=True)


def test_texts_run_on_and_the_rest_is_filled():
    packed = pack([text(1, 2, 3, 9), text(4, 5, 9)], 3, PAD)
    assert packed.input_ids.tolist() == [[1, 2, 3], [9, 4, 5]]  # the last row would hold one token, which predicts nothing
    packed = pack([text(1, 2, 3, 9), text(4, 9)], 4, PAD)
    assert packed.input_ids.tolist() == [[1, 2, 3, 9], [4, 9, PAD, PAD]]
    assert packed.labels.tolist() == [[1, 2, 3, 9], [4, 9, IGNORED, IGNORED]]
    assert packed.targets == 4


def test_records_stay_whole_and_share_rows():
    packed = pack([record([1, 2], [3, 4]), record([5, 6], [7, 8]), record([9], [10])], 6, PAD)
    assert packed.input_ids.tolist() == [[1, 2, 3, 4, 9, 10], [5, 6, 7, 8, PAD, PAD]]
    assert packed.labels.tolist()[0] == [IGNORED, IGNORED, 3, 4, IGNORED, 10]
    assert packed.targets == 5


def test_a_record_learns_nothing_from_the_one_before():
    packed = pack([record([1], [2]), record([], [3, 4])], 8, PAD)
    assert packed.labels.tolist() == [[IGNORED, 2, IGNORED, 4, *[IGNORED] * 4]]


def test_long_records_are_cut_and_told(caplog):
    with caplog.at_level(logging.WARNING, "peftk.cli"):
        packed = pack([record([1], [2, 3, 4, 5]), record([1, 2, 3, 4], [5])], 3, PAD)
    assert packed.input_ids.tolist() == [[1, 2, 3]]  # the second's completion lies beyond the cut: nothing to learn
    assert "2 of 2 records are longer than --seq-len 3" in caplog.text


def test_no_token_of_a_text_is_on_both_sides():
    train, held_out = split([text(*range(100)), text(*range(100, 150))], 0.1, seed=0)
    assert [d.input_ids for d in train] == [[*range(90)], [*range(100, 145)]]
    assert [d.input_ids for d in held_out] == [[*range(90, 100)], [*range(145, 150)]]


@pytest.mark.parametrize("seed", range(5))
def test_no_record_is_on_both_sides_even_where_it_occurs_twice(seed):
    records = [record([i % 7], [50 + i % 7]) for i in range(40)]
    train, held_out = split(records, 0.3, seed)
    sides = [{tuple(d.input_ids) for d in side} for side in (train, held_out)]
    assert not sides[0] & sides[1] and len(sides[1]) == 2 and len(train) + len(held_out) == 40


def test_the_seed_decides_which_records_are_held_out():
    records = [record([i], [100 + i]) for i in range(40)]
    first, again, other = (split(records, 0.2, seed)[1] for seed in (1, 1, 2))
    assert first == again != other


def test_nothing_is_held_out_at_0():
    train, held_out = split_and_pack([text(*range(10))], 5, 0.0, 0, PAD)
    assert len(train) == 2 and len(held_out) == 0


def test_too_little_data_names_the_flag():
    with pytest.raises(UserError, match="--data: 7 tokens to train on do not fill one sequence of --seq-len 32"):
        split_and_pack([text(*range(10))], 32, 0.3, 0, PAD)
    with pytest.raises(UserError, match="no token to learn from within --seq-len 2"):
        split_and_pack([record([1, 2, 3], [i]) for i in range(4, 8)], 2, 0.25, 0, PAD)
    with pytest.raises(UserError, match="--eval-fraction: one record can't be split"):
        split_and_pack([record([1], [2])], 4, 0.1, 0, PAD)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_each_pass_takes_every_sequence_once(n):
    order = batch_order(n, 0, 4 * n, seed=3)
    for i in range(4):
        assert sorted(order[i * n : (i + 1) * n]) == list(range(n))
    pieces = [j for first in range(0, 4 * n, 2) for j in batch_order(n, first, 2, seed=3)]
    assert pieces[: 4 * n] == order
    if n == 8:
        assert order[:8] != order[8:16] and order != batch_order(n, 0, 4 * n, seed=4)


def test_packing_leaves_the_random_generator_alone():
    before = torch.get_rng_state()
    split([record([i], [i]) for i in range(9)], 0.3, 1)
    batch_order(5, 0, 10, 0)
    assert torch.equal(before, torch.get_rng_state())
