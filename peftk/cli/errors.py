"""What the commands say when the fault lies in what they were given."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


class UserError(Exception):
    """A mistake in a flag, a file or a line of one; the program prints the message alone and exits with 2."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package. ImportError tells which extra of peftk brings it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise ImportError(f"{module} is not installed: pip install 'peftk[{extra}]'") from error
