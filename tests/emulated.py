"""What an op's test body leaves to other implementations, where a GPU's kernels are emulated."""

from __future__ import annotations

import math

import pytest

MOST = 4_000_000  # multiplications and additions: a few seconds of an emulator
DOORS = ("cuda-host", "cuda-ptx", "triton-ptx")


def skip_beyond_reach(implementation: str, *sizes: int) -> None:
    """Skip a product of these sizes where it would take an emulator minutes."""
    if implementation in DOORS and math.prod(sizes) > MOST:
        pytest.skip(f"{' x '.join(map(str, sizes))} multiplications are beyond an emulator's reach")


def skip_but_a_sample(implementation: str, of_the_sample: bool) -> None:
    """Skip what the other implementations cover: each list of weights is another Triton kernel to compile."""
    if implementation in DOORS and not of_the_sample:
        pytest.skip("an emulator runs a sample of these")
