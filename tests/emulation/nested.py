"""Arguments of GPU functions: tensors in nested lists and tuples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def mapped(argument: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The same lists and tuples with ``change`` of each tensor."""
    if isinstance(argument, (list, tuple)):
        return type(argument)(mapped(one, change) for one in argument)
    return change(argument) if isinstance(argument, torch.Tensor) else argument
