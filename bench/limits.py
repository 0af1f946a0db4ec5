"""What the machine can do, measured in the same run as everything else: memory bandwidth, and arithmetic twice over.

``peak`` is what a loop that only multiplies in registers reaches (bench/peak.py; needs a C compiler), ``matmul`` torch.matmul's
best rate. A share is of the higher of the two; without a compiler that is torch.matmul's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import peftk
from bench.measure import Work, interleave
from bench.peak import register_peak

SIZE = 2**28  # bytes, an array of the bandwidth measurement: 8 times a 32 MB L3
SIDE = 2048  # of the square matrices
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Limits:
    """What this machine reached in this run; bytes and operations a second."""

    read: float
    write: float
    copy: float  # bytes read plus bytes written
    matmul: dict[torch.dtype, float]  # torch.matmul
    peak: dict[torch.dtype, float] = field(default_factory=dict)  # multiplying in registers; empty where it can't be built
    no_peak: str = ""  # why it is empty

    def multiplied_as(self, dtype: torch.dtype) -> torch.dtype:
        """fp16 is multiplied as fp32 on a CPU, where its own rate isn't measured."""
        return dtype if dtype in self.matmul else torch.float32

    def rate(self, dtype: torch.dtype) -> float:
        """The most operations a second."""
        dtype = self.multiplied_as(dtype)
        return max(self.matmul[dtype], self.peak.get(dtype, 0.0))

    def seconds(self, work: Work) -> float:
        """The least time for this work: its memory traffic or its arithmetic, whichever takes longer."""
        return max(self._memory(work), self._arithmetic(work))

    def binding(self, work: Work) -> str:
        """Which of the two that is, and how it was measured."""
        if self._memory(work) >= self._arithmetic(work):
            return f"{self.read / 1e9:.1f} GB/s read"
        rate = self.rate(work.dtype)
        by_torch = rate == self.matmul[self.multiplied_as(work.dtype)]
        return f"{rate / 1e9:.0f} GFLOP/s {'by torch.matmul' if by_torch else 'in registers'}"

    def _memory(self, work: Work) -> float:
        return work.read / self.read + work.write / self.write

    def _arithmetic(self, work: Work) -> float:
        return work.flop / self.rate(work.dtype) if work.flop else 0.0

    def __str__(self) -> str:
        memory = f"read {self.read / 1e9:.1f} GB/s, write {self.write / 1e9:.1f} GB/s, copy {self.copy / 1e9:.1f} GB/s"
        registers = f"in registers {_rates(self.peak)}" if self.peak else f"no register loop ({self.no_peak})"
        return f"{memory}; torch.matmul {_rates(self.matmul)}; {registers}"


def _rates(rates: dict[torch.dtype, float]) -> str:
    return ", ".join(f"{str(dtype).removeprefix('torch.')} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in rates.items())


def measure_limits(size: int = SIZE, side: int = SIDE, rounds: int = 7) -> Limits:
    """Bandwidth on arrays of ``size`` bytes, all mapped beforehand; each figure the best of ``rounds``, with torch's threads."""
    source = torch.ones(size // 4, dtype=torch.float32)
    target = torch.ones_like(source)
    read = min(_best(lambda: torch.dot(source, source), rounds), _best(source.sum, rounds))
    copy = _best(lambda: target.copy_(source), rounds)
    write = min(_best(target.zero_, rounds), copy)
    matmul = {dtype: 2 * side**3 / _best_matmul(side, dtype, rounds) for dtype in DTYPES}
    peak, no_peak = register_peak(peftk.info().cpu_tier or "scalar", torch.get_num_threads(), rounds)
    return Limits(size / read, size / write, 2 * size / copy, matmul, peak, no_peak)


def _best_matmul(side: int, dtype: torch.dtype, rounds: int) -> float:
    """a b^T, as in a linear layer: where oneDNN has no bf16 product, torch's own a b takes minutes."""
    a, b = torch.randn(2, side, side).to(dtype)
    out = torch.empty_like(a)
    return _best(lambda: torch.mm(a, b.T, out=out), rounds)


def _best(run: Callable[[], Any], rounds: int) -> float:
    return min(interleave([run], rounds, budget=2.0, least=2)[0])
