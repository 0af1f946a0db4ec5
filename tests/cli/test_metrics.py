from __future__ import annotations

import pytest

from peftk.cli.metrics import accuracy, edit_distance, exact_match, macro_f1, micro_f1, word_error_rate


def test_shares_by_hand():
    predicted, expected = [0, 1, 1, 2, 2, 2], [0, 1, 2, 2, 2, 0]
    assert accuracy(predicted, expected) == pytest.approx(4 / 6)
    # F1 of 0: 2*1/(1+2), of 1: 2*1/(2+1), of 2: 2*2/(3+3)
    assert macro_f1(predicted, expected) == pytest.approx(2 / 3)
    assert macro_f1([0, 0], [0, 1]) == pytest.approx((2 / 3 + 0) / 2)  # a class that is never predicted counts


def test_micro_f1_leaves_the_outside_out():
    #            right  missed  invented  other class
    predicted = [1, 0, 0, 2, 1]
    expected = [1, 1, 0, 0, 2]
    assert micro_f1(predicted, expected, without=0) == pytest.approx(2 * 1 / (3 + 3))
    assert micro_f1([0, 0], [0, 0], without=0) == 0  # nothing to find, nothing found
    assert micro_f1([0, 1], [0, 1], without=None) == 1


def test_words_to_change_add_and_drop():
    assert edit_distance("a b c".split(), "a x c d".split()) == 2
    assert edit_distance([], ["a"]) == edit_distance(["a"], []) == 1
    assert word_error_rate(["a b", "", "q r s"], ["a c", "x", "q"]) == pytest.approx((1 + 1 + 2) / 4)
    assert word_error_rate(["A b."], ["a b"]) == 1  # case and punctuation count
    assert exact_match([" a b", "c"], ["a b ", "d"]) == 0.5
