"""What the properties are tried on: ragged shapes, every dtype and block size, and values that break kernels."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from peftk.format.code4 import BLOCK_SIZES

FULL = bool(os.environ.get("PEFTK_MANY_EXAMPLES"))
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.differing_executors]


def examples(few: int) -> settings:
    """CI: ``few``, always the same ones. PEFTK_MANY_EXAMPLES=1: a hundred times as many, new ones in each run."""
    return settings(
        max_examples=100 * few if FULL else few, derandomize=not FULL, deadline=None, database=None, suppress_health_check=CHECKS
    )


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
block_sizes = st.sampled_from(BLOCK_SIZES[:4])
quant_types = st.sampled_from(["nf4", "fp4"])
seeds = st.integers(0, 2**31)
sizes = st.sampled_from([1, 2, 3, 7, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 130])
rows = st.sampled_from([1, 2, 3, 8, 16, 17, 33])
threads = st.sampled_from([1, 2, 3])
KINDS = ("gaussian", "zeros", "ties", "subnormal", "large", "one outlier", "constant", "scales")
kinds = st.sampled_from(KINDS)


def values(shape: tuple[int, ...], kind: str, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Finite in ``dtype``; no two rows of the same scale unless the kind says so."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "zeros":
        x = x * (torch.rand(shape, generator=generator) > 0.7)
    elif kind == "ties":
        x = torch.randint(-4, 5, shape, generator=generator).float() / 4
    elif kind == "subnormal":
        x = x * torch.finfo(dtype).tiny / 4
    elif kind == "large":
        x = x.clamp(-3, 3) / 3 * torch.finfo(dtype).max / 8
    elif kind == "one outlier":
        x.view(-1)[seed % x.numel()] = 1e4
    elif kind == "constant":
        x = torch.full(shape, float(x.view(-1)[0]))
    elif kind == "scales":
        x = x * 2.0 ** torch.randint(-20, 5, (*shape[:-1], 1), generator=generator)
    return x.to(dtype)
