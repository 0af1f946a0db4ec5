"""What fields of LoRA's config may hold, and those that are configs themselves."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

try:
    from re import _parser
except ImportError:  # Python 3.10
    import sre_parse as _parser


def is_rank(value: Any) -> bool:
    """A positive integer; True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: Any) -> bool:
    """A finite number; True is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_expression(value: Any) -> bool:
    """A regular expression that compiles, and whose search can't take for ever: a config may come from anybody."""
    try:
        re.compile(value)
    except (re.error, TypeError, RecursionError, OverflowError):
        return False
    return _is_quick(_parser.parse(value))


_MOST_REPEATS = 5  # time grows with the length of a path to this power
_MOST_OPTIONS = 10  # time grows with 2 to this power


def _is_quick(parsed: Any) -> bool:
    """No repetition has another, an option or alternatives inside: Python's search tries every way of dividing a text among them.
    And there are few of each."""
    repeats = options = 0
    for within, code, most in _codes(parsed, False):
        if within:
            return False
        is_repeat = code in _REPEATS
        repeats += is_repeat and most > 1
        options += not is_repeat or most == 1
    return repeats <= _MOST_REPEATS and options <= _MOST_OPTIONS


_REPEATS = (_parser.MAX_REPEAT, _parser.MIN_REPEAT)


def _codes(parsed: Any, within: bool) -> Iterator[tuple[bool, Any, int]]:
    """(whether it stands inside a repetition, what, how often at most) of each repetition, branch and reference to a group."""
    for code, argument in parsed:
        if code in _REPEATS:
            least, most, body = argument
            if least != most:
                yield within, code, most
            yield from _codes(body, within or most > 1)
        elif code in (_parser.BRANCH, _parser.GROUPREF):
            yield within, code, 1
            for branch in argument[1] if code is _parser.BRANCH else ():
                yield from _codes(branch, within)
        elif code is _parser.SUBPATTERN:
            yield from _codes(argument[3], within)
        elif code in (_parser.ASSERT, _parser.ASSERT_NOT):
            yield from _codes(argument[1], within)


def are_names(value: Any) -> bool:
    """None, a regular expression, or a collection of strings."""
    if value is None or isinstance(value, str):
        return value is None or is_expression(value)
    return isinstance(value, list | tuple | set) and all(isinstance(name, str) for name in value)


def are_layers(value: Any) -> bool:
    """A number from 0, or a collection of them."""
    numbers = [value] if isinstance(value, int) else value
    return isinstance(numbers, list | tuple | set | range) and all(
        isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers
    )


def is_pattern(value: Any, is_right: Callable[[Any], bool]) -> bool:
    """Regular expressions with values that are right."""
    return isinstance(value, dict) and all(is_expression(key) and is_right(v) for key, v in value.items())


@dataclass
class LoftQConfig:
    """HF peft's fields, and how the weight is quantised, which HF peft leaves to another place."""

    loftq_bits: int = 4
    loftq_iter: int = 1  # alternations of quantising and decomposing
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        if self.loftq_bits != 4:
            raise ValueError(f"loftq_bits: expected 4, as the weights are NF4, got {self.loftq_bits!r}")
        if not is_rank(self.loftq_iter):
            raise ValueError(f"loftq_iter: expected a positive integer, got {self.loftq_iter!r}")


@dataclass
class EvaConfig:
    """HF peft's fields (Paischer et al. 2024)."""

    rho: float = 2.0  # a layer's rank may grow to rho * r; 1 leaves all as they are
    tau: float = 0.99  # cosine with the step before from which a direction counts as found
    use_label_mask: bool = True  # tokens whose label is label_mask_value don't count
    label_mask_value: int = -100
    whiten: bool = False  # divide each direction by the square root of its singular value
    adjust_scaling_factors: bool = True  # alpha grows with the rank, so that alpha / r stays

    def __post_init__(self) -> None:
        if not is_number(self.rho) or self.rho < 1:
            raise ValueError(f"rho: expected a number of at least 1, got {self.rho!r}")
        if not is_number(self.tau) or not 0 <= self.tau <= 1:
            raise ValueError(f"tau: expected a cosine in [0, 1], got {self.tau!r}")


def sub_config(name: str, value: Any, kind: type, is_used: bool) -> Any:
    """An instance of ``kind`` from one, from a dict, from HF peft's of the same fields; the defaults where None is used."""
    if dataclasses.is_dataclass(value) and not isinstance(value, kind):
        value = dataclasses.asdict(value)
    if not value:
        return kind() if is_used else None
    if not isinstance(value, kind | dict):
        raise ValueError(f"{name}: expected a {kind.__name__} or a dict of its fields, got {value!r}")
    if isinstance(value, dict) and (unknown := sorted(set(value) - {f.name for f in dataclasses.fields(kind)})):
        raise ValueError(f"{name}: expected fields of {kind.__name__}, got {', '.join(unknown)}")
    return kind(**value) if isinstance(value, dict) else value
