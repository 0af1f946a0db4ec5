"""What the GPU can do, measured with torch's own kernels in the same run as everything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bench.gpu.device import Device
from bench.gpu.measure import best
from bench.limits import Limits

SIZE = 2**30  # bytes, an array of the bandwidth measurement; at least 8 times L2
SIDES = {torch.bfloat16: 8192, torch.float16: 8192, torch.float32: 4096}  # of the square matrices
ROUNDS = 20
LAUNCHES = 200  # on end


@dataclass(frozen=True)
class GpuLimits(Limits):
    """Beside bandwidth and arithmetic: what the least of kernels costs, one after the other."""

    launch: float = 0.0  # s, called from Python
    launch_in_graph: float = 0.0  # s

    def __str__(self) -> str:
        launches = f"a launch {self.launch * 1e6:.1f} us, in a CUDA graph {self.launch_in_graph * 1e6:.1f} us"
        return f"{super().__str__()}; {launches}"


def measure_limits(
    device: Device, size: int = SIZE, sides: dict[torch.dtype, int] = SIDES, rounds: int = ROUNDS, launches: int = LAUNCHES
) -> GpuLimits:
    """Each figure the best of ``rounds``; fp32 products without TF32."""
    read, write, copy = _bandwidths(device, max(size, 8 * device.l2) // 4, rounds)
    with fp32_as_it_is():
        matmul = {dtype: 2 * side**3 / _best_matmul(device, side, dtype, rounds) for dtype, side in sides.items()}
    one = torch.ones(1, device=device.place)
    launch, in_graph = (best(device, one.zero_, rounds, launches, graph) for graph in (False, True))
    no_peak = "torch.matmul is the peak"
    return GpuLimits(read, write, copy, matmul, no_peak=no_peak, launch=launch, launch_in_graph=in_graph)


def _bandwidths(device: Device, count: int, rounds: int) -> tuple[float, float, float]:
    """Bytes a second read, written, and both where copied, on arrays of ``count`` fp32."""
    source = torch.ones(count, device=device.place)
    target = torch.ones_like(source)
    read = min(best(device, run, rounds) for run in (source.sum, source.amax, lambda: torch.dot(source, source)))
    write = min(best(device, run, rounds) for run in (target.zero_, lambda: target.fill_(1.0)))
    copy = best(device, lambda: target.copy_(source), rounds)
    return source.nbytes / read, source.nbytes / write, 2 * source.nbytes / copy


def _best_matmul(device: Device, side: int, dtype: torch.dtype, rounds: int) -> float:
    """a b^T, as in a linear layer."""
    a, b = (torch.randn(side, side, device=device.place).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return best(device, lambda: torch.mm(a, b.T, out=out), rounds)


@contextmanager
def fp32_as_it_is() -> Iterator[None]:
    """No TF32 and no bf16 in fp32 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
