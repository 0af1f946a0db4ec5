"""Calculated limits, never measured: how long a GPU must take at least for a kernel's bytes, issue slots and tensor operations.

An issue slot is one instruction of one thread: four schedulers of a multiprocessor start one warp each a clock, 128 slots.
Narrower units (64 integer multiplies, 32 shuffles a clock, …), latencies and caches are left out: a kernel is slower."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.static.gates import Row
from bench.static.occupancy import capability

SLOTS = 128  # a clock and multiprocessor, Volta to Blackwell
SIZE = 4096  # n and k of the weight whose time is told
MARK = "calculated, not measured"


@dataclass(frozen=True)
class Gpu:
    """From the public data sheets: boost clock, dense rates, L2 cache."""

    name: str
    capability: int
    sms: int
    ghz: float
    gb_s: float
    tensor_tflop_s: float  # 16-bit inputs (fp16 on Turing, else bf16), fp32 sums
    l2_mb: float


GPUS = (
    Gpu("T4", 75, 40, 1.590, 320, 65, 4),  # NVIDIA T4 data sheet; Turing whitepaper
    Gpu("A100", 80, 108, 1.410, 2039, 312, 40),  # A100 80 GB SXM data sheet; Ampere whitepaper
    Gpu("A10", 86, 72, 1.695, 600, 125, 6),  # A10 data sheet
    Gpu("RTX 3090", 86, 82, 1.695, 936, 71, 6),  # GA102 whitepaper
    Gpu("L4", 89, 58, 2.040, 300, 121, 48),  # L4 data sheet: 242 with sparsity
    Gpu("RTX 4090", 89, 128, 2.520, 1008, 165.2, 72),  # Ada whitepaper
    Gpu("H100", 90, 132, 1.830, 3350, 989, 50),  # H100 SXM data sheet; the clock is that of its tensor rate
    Gpu("H200", 90, 132, 1.830, 4800, 989, 50),  # H200 SXM data sheet
    Gpu("B200", 100, 148, 1.850, 8000, 2250, 126),  # HGX B200 data sheet; the clock is that of its tensor rate
    Gpu("RTX 5090", 120, 170, 2.407, 1792, 209.5, 96),  # RTX Blackwell whitepaper
)


@dataclass(frozen=True)
class Limit:
    """Microseconds that each resource takes for so many elements, everything else being free."""

    by_bytes: float
    by_issue: float
    by_tensor: float

    @property
    def least(self) -> float:
        return max(self.by_bytes, self.by_issue, self.by_tensor)

    @property
    def binds(self) -> str:
        return max((("bytes", self.by_bytes), ("issue", self.by_issue), ("tensor", self.by_tensor)), key=lambda one: one[1])[0]


def limit(gpu: Gpu, elements: int, bytes_each: float, instructions_each: float, flop_each: float = 0) -> Limit:
    """bytes_each, instructions_each (of a thread), flop_each (tensor cores): an element's."""
    return Limit(
        elements * bytes_each / gpu.gb_s / 1e3,
        elements * instructions_each / (gpu.sms * SLOTS * gpu.ghz * 1e3),
        elements * flop_each / gpu.tensor_tflop_s / 1e6,
    )


def serves(target: str, gpu: Gpu) -> bool:
    """Whether a GPU runs a target's code: sm_80's on all of Ampere and Ada."""
    return target.startswith("sm_") and capability(target) == (80 if 80 <= gpu.capability < 90 else gpu.capability)


def table(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """A header, then of each kernel that has bytes and instructions an element its least microseconds on each GPU, and what binds
    there, from the code for that GPU."""
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        if not (row.per_element and row.bytes):
            continue
        for gpu in GPUS:
            if serves(row.target, gpu):
                one = limit(gpu, SIZE * SIZE, row.bytes, row.per_element, row.flop)
                lines.setdefault((row.op, row.backend, row.kernel), {})[gpu.name] = f"{one.least:.1f} {one.binds}"
    header = ("op", "backend", "kernel", *(gpu.name for gpu in GPUS))
    return [header, *((*key, *(cells.get(gpu.name, "") for gpu in GPUS)) for key, cells in lines.items())]
