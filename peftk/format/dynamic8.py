"""The dynamic 8-bit codes of double quantisation and of 8-bit optimizers (Dettmers et al. 2022, "8-bit Optimizers via
Block-wise Quantization", section 1.3): for each decade 10^(i-6), i = 0…6, the midpoints of evenly spaced points on [0.1, 1]."""

from __future__ import annotations

from functools import cache

import torch

NESTED_BLOCK = 256  # absmax values that share one fp32 scale in double quantisation
STATE_BLOCK = 256  # elements of an 8-bit optimizer state that share one fp32 scale


@cache
def values8(signed: bool = True, device: torch.device | str = "cpu") -> torch.Tensor:
    """The 256 ascending values, fp32, on ``device``."""
    values = [0.0, 1.0]
    for i in range(7):
        points = _points(2 ** (i if signed else i + 1) + 1)
        midpoints = 10 ** (i - 6) * ((points[:-1] + points[1:]) / 2)
        values += midpoints.tolist()
        if signed:
            values += (-midpoints).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu").to(device)


def _points(count: int) -> torch.Tensor:
    """``count`` fp32 points on [0.1, 1], from both ends towards the middle, each rounded once: what torch.linspace gives with
    fused multiply-add, on every machine."""
    start = torch.tensor(0.1, dtype=torch.float32, device="cpu")
    index = torch.arange(count, dtype=torch.float64, device="cpu")
    step = ((1 - start) / (count - 1)).double()
    from_end = 1 - step * (count - 1 - index)
    return torch.where(index < count // 2, start.double() + step * index, from_end).float()


@cache
def thresholds8(signed: bool = True, device: torch.device | str = "cpu") -> torch.Tensor:
    """(255,) fp32: the largest number not above each midpoint, so that ``x > threshold`` picks the nearest value exactly and
    a tie goes to the lower code."""
    values = values8(signed).double()
    middle = (values[:-1] + values[1:]) / 2
    nearest = middle.float()
    below = torch.nextafter(nearest, torch.full_like(nearest, -torch.inf))
    return torch.where(nearest.double() > middle, below, nearest).to(device)


def zero_code8(signed: bool = True) -> int:
    """The code whose value is 0."""
    return 127 if signed else 0
