"""Ctrl-C and SIGTERM end a run between two steps, with a checkpoint; a second one ends it where it is."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop, and has. ``signum``: by which signal; the message says how to go on."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], int]]:
    """Gives a function: the signal that asked, 0 while none has. Outside the main thread, where Python takes no signals, 0."""
    asked = 0

    def ask(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = signum
        print("\nstopping after this step; once more stops at once, back to the last checkpoint", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
