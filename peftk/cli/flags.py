"""Types of flags: argparse prints their messages after the flag's name."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError

from peftk import planner


def _whole(text: str, low: int, expected: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ArgumentTypeError(f"expected {expected}, got {text!r}") from None
    if value < low:
        raise ArgumentTypeError(f"expected {expected}, got {text}")
    return value


def _number(text: str, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ArgumentTypeError(f"expected {expected}, got {text!r}") from None
    if not math.isfinite(value):
        raise ArgumentTypeError(f"expected {expected}, got {text}")
    return value


def positive_int(text: str) -> int:
    """1, 2, ..."""
    return _whole(text, 1, "a whole number of at least 1")


def non_negative_int(text: str) -> int:
    """0, 1, ..."""
    return _whole(text, 0, "a whole number of at least 0")


def sequence_length(text: str) -> int:
    """2, 3, ...: one token predicts the next."""
    return _whole(text, 2, "a whole number of at least 2")


def seed(text: str) -> int:
    """What torch.manual_seed takes, with room for one seed an epoch."""
    value = non_negative_int(text)
    if value >= 1 << 62:
        raise ArgumentTypeError(f"expected a whole number below 2^62, got {text}")
    return value


def positive_float(text: str) -> float:
    """Above 0."""
    value = _number(text, "a number above 0")
    if value <= 0:
        raise ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def non_negative_float(text: str) -> float:
    """0 or above."""
    value = _number(text, "a number of at least 0")
    if value < 0:
        raise ArgumentTypeError(f"expected a number of at least 0, got {text}")
    return value


def share(text: str) -> float:
    """In [0, 1)."""
    value = _number(text, "a share in [0, 1)")
    if not 0 <= value < 1:
        raise ArgumentTypeError(f"expected a share in [0, 1), got {text}")
    return value


def share_above_0(text: str) -> float:
    """In (0, 1]."""
    value = _number(text, "a share in (0, 1]")
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"expected a share in (0, 1], got {text}")
    return value


def size(text: str) -> int:
    """Bytes, of '2GB' or '512MiB'."""
    try:
        return planner.size_of(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def card(text: str) -> tuple[str, int]:
    """A card's name and its bytes, of the name or of a size."""
    try:
        return planner.card_of(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
