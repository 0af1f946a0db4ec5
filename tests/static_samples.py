"""bench/samples/kernels.cu compiled, read back, and skipped where nothing can be."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from bench.static import matrix, nvcc, sass
from bench.static.sass import Kernel

SOURCE = Path(__file__).parent / "bench" / "samples" / "kernels.cu"
needs_compilers = pytest.mark.skipif(bool(matrix.why_not()), reason=matrix.why_not() or "-")


@cache
def samples(target: str) -> dict[str, Kernel]:
    """Name -> kernel."""
    return {kernel.name: kernel for kernel in sass.kernels(nvcc.compiled(SOURCE, target))}
