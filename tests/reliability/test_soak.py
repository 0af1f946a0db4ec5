"""A short soak, and that one which leaks is told; the long one is ``python -m tests.reliability.soak``."""

from __future__ import annotations

import mmap

import torch

from tests.reliability import soak

STEPS = 200  # the thread count changes once


def test_memory_does_not_grow():
    growth, sizes = soak.soak(STEPS, show=False)
    assert len(sizes) == 10 and growth <= soak.ALLOWED, sizes


def test_a_leak_is_told(monkeypatch):
    """64 KiB a step, mapped: what is allocated may fill memory that earlier tests freed."""
    kept, step = [], soak.nn.functional.cross_entropy

    def leaking(*arguments: torch.Tensor) -> torch.Tensor:
        kept.append(mmap.mmap(-1, 1 << 16))
        kept[-1].write(bytes(1 << 16))
        return step(*arguments)

    monkeypatch.setattr(soak.nn.functional, "cross_entropy", leaking)
    growth, sizes = soak.soak(STEPS, show=False)
    assert growth > soak.ALLOWED, sizes
