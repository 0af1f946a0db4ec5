"""Checkpoints of a few tensors, in files and in memory."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Every row its own scale, so that blocks in the wrong place show."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    return (w * torch.logspace(-2, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)
