"""A progress bar where tqdm is installed; the work itself needs none."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], description: str, enabled: bool) -> Iterable[T]:
    """``items``, with a bar while they are worked through. Without tqdm (extra ``peftk[hf]``) one log line instead."""
    if not enabled or not items:
        return items
    if find_spec("tqdm") is None:
        logging.getLogger("peftk").info("%s: %d", description, len(items))
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=description)


def write(text: str) -> None:
    """Print above the bars, where there are any."""
    if find_spec("tqdm") is None:
        print(text, flush=True)
        return
    from tqdm.auto import tqdm

    tqdm.write(text)
