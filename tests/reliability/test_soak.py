"""A short soak, and that one which leaks is told; the long one is ``python -m tests.reliability.soak``."""

from __future__ import annotations

import torch

from tests.reliability import soak

STEPS = 200  # the thread count changes once


def test_memory_does_not_grow():
    growth, sizes = soak.soak(STEPS, show=False)
    assert len(sizes) == 10 and growth <= soak.ALLOWED, sizes


def test_a_leak_is_told(monkeypatch):
    """Of a tensor a step."""
    kept, step = [], soak.nn.functional.cross_entropy

    def leaking(*arguments: torch.Tensor) -> torch.Tensor:
        kept.append(torch.ones(8192))
        return step(*arguments)

    monkeypatch.setattr(soak.nn.functional, "cross_entropy", leaking)
    growth, sizes = soak.soak(STEPS, show=False)
    assert growth > soak.ALLOWED, sizes
