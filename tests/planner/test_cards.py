from __future__ import annotations

import pytest

from peftk.planner.cards import card_of, size_of


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("512 MiB", 512 << 20), ("1.5gib", 3 << 29), ("7", 7), ("1TB", 10**12)],
)
def test_sizes(text: str, size: int):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24 apples", "0GB", "-3GB", "1.2.3GB"])
def test_sizes_that_are_none(text: str):
    with pytest.raises(ValueError, match="expected a size"):
        size_of(text)


def test_cards():
    assert card_of("RTX-4090") == ("rtx-4090", 24 << 30)
    assert card_of("10GB") == ("10GB", 10**10)
    with pytest.raises(ValueError, match="expected a size such as 24GB or 512MiB, got 'rtx-1'; or one of rtx-3060, t4"):
        card_of("rtx-1")
