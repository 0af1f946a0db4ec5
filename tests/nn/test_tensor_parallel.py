"""What can't be split; tests/distributed/ has what can."""

import pytest
from torch import nn

import peftk
from peftk.nn.tensor_parallel import COLUMNS, ROWS, check_split


@pytest.mark.parametrize(
    ("layer", "ranks", "dim", "message"),
    [
        (lambda: peftk.nn.NF4Linear(64, 48), 5, ROWS, r"rows in multiples of 5 processes, got a weight of shape \(48, 64\)"),
        (lambda: peftk.nn.NF4Linear(96, 48), 2, ROWS, "blocks of 64 elements end with a row of a part, got 96 columns"),
        (lambda: peftk.nn.NF4Linear(128, 48, bias=False), 4, COLUMNS, "blocks of 64 elements .* got 128 / 4 columns of a part"),
        (lambda: peftk.nn.NF4Linear(128, 48), 2, COLUMNS, "without a bias"),
        (lambda: peftk.nn.base_layer(nn.Linear(9, 4, bias=False)), 2, COLUMNS, "columns in multiples of 2"),
    ],
)
def test_refuses(layer, ranks, dim, message):
    with pytest.raises(ValueError, match=f"module: expected .*{message}"):
        check_split(layer(), ranks, dim)


def test_takes_what_fits():
    check_split(peftk.nn.NF4Linear(128, 48), 4, ROWS)
    check_split(peftk.nn.NF4Linear(128, 47, bias=False), 2, COLUMNS)
