"""A ``bench.gpu.device.Device`` without a GPU: tensors on the CPU, a clock that moves only when it is told, and a log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.at = gpu, None

    def record(self) -> None:
        self.gpu.log.append("event")
        self.gpu.now += self.gpu.tick
        self.at = self.gpu.now

    def synchronize(self) -> None:
        self.gpu.log.append("wait")

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.gpu.log[-1] == "wait", "a time was read before the event had passed"
        return (end.at - self.at) * 1e3


@dataclass
class FakeGpu:
    """``tick``: seconds between two events with nothing between them."""

    implementations: tuple[str, ...] = ("cpu", "cuda")  # the first runs, the second says why not
    tick: float = 0.0
    clock: str = "1000"
    now: float = 0.0
    l2: int = 1024
    name: str = "fake-gpu"
    isa: str = "sm_00"
    place: torch.device = field(default_factory=lambda: torch.device("cpu"))
    log: list[str] = field(default_factory=list)

    def spend(self, who: str, seconds: float) -> None:
        """What a candidate does."""
        self.log.append(who)
        self.now += seconds

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    def flush(self) -> None:
        self.log.append("flush")
        self.now += 9.0  # in no figure

    def hold(self) -> None:
        self.log.append("hold")
        self.now += 9.0

    def synchronise(self) -> None:
        self.log.append("wait")

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        self.log.append("capture")
        run()
        return lambda: (self.log.append("replay"), run())[1]

    def facts(self) -> dict[str, str]:
        return {"cuda": "0.0", "driver": "0.0", "power_cap_w": "1", "max_sm_clock_mhz": "2"}

    def clock_under(self, run: Callable[[], Any]) -> str:
        run()
        return self.clock
