"""The launches that an op makes, recorded instead of executed: what ahead-of-time compilation starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import peftk
from peftk.ops import gpu


@dataclass(frozen=True)
class Launch:
    """One call of a door's ``launch``."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Recorder:
    """Stands where gpu.TritonDoor stands and computes nothing."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def why_not(self) -> str:
        """It always can."""
        return ""

    def reasons_against(self, *tensors: torch.Tensor | None) -> list[str]:
        """None."""
        return []

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """Kept in ``launches``."""
        self.launches.append(Launch(kernel, grid, arguments, options))


def recorded(call: Callable[[], Any]) -> list[Launch]:
    """What ``call`` launches with Triton."""
    door = Recorder()
    with gpu.through("triton", door), peftk.use("triton"):
        call()
    return door.launches
