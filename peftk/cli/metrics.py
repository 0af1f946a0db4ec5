"""How right predictions are: shares in [0, 1], but a word error rate, which may be more."""

from __future__ import annotations

from collections.abc import Sequence


def accuracy(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """Share of predictions that are right."""
    return sum(p == e for p, e in zip(predicted, expected, strict=True)) / len(expected)


def macro_f1(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """Mean of the F1 of each class that occurs among the expected or the predicted ones."""
    classes = {*predicted, *expected}
    return sum(_f1(predicted, expected, {one}) for one in classes) / len(classes)


def micro_f1(predicted: Sequence[int], expected: Sequence[int], without: int | None) -> float:
    """F1 over all classes but ``without``, counted together; 0 where there is nothing to find and nothing is found."""
    return _f1(predicted, expected, {*predicted, *expected} - {without})


def _f1(predicted: Sequence[int], expected: Sequence[int], classes: set[int]) -> float:
    right = sum(p == e and e in classes for p, e in zip(predicted, expected, strict=True))
    found = sum(p in classes for p in predicted)
    wanted = sum(e in classes for e in expected)
    return 2 * right / (found + wanted) if found + wanted else 0.0


def word_error_rate(said: Sequence[str], expected: Sequence[str]) -> float:
    """Words to change, add or drop, of all texts together, by the number of expected words. Words are what stands between
    blanks, with case and punctuation as they are. 0 where nothing is expected."""
    pairs = [(s.split(), e.split()) for s, e in zip(said, expected, strict=True)]
    words = sum(len(e) for _, e in pairs)
    return sum(edit_distance(s, e) for s, e in pairs) / words if words else 0.0


def exact_match(said: Sequence[str], expected: Sequence[str]) -> float:
    """Share of texts that are the same, blanks at the ends aside."""
    return sum(s.strip() == e.strip() for s, e in zip(said, expected, strict=True)) / len(expected)


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Fewest changes, additions and removals that make ``b`` of ``a`` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (one != other))
    return row[-1]
