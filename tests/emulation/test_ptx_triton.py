"""Kernels that Triton compiled, in the emulator, against torch."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import torch

from bench.static import triton_aot
from emulation.ptx import Memory, Program, Report

pytestmark = pytest.mark.skipif(bool(triton_aot.why_not()), reason=triton_aot.why_not())
if not triton_aot.why_not():
    import triton
    import triton.language as tl

    @triton.jit
    def softmax_kernel(x, y, n, BLOCK: tl.constexpr):
        row, column = tl.program_id(0), tl.arange(0, BLOCK)
        inside = column < n
        values = tl.load(x + row * n + column, mask=inside, other=-float("inf"))
        powers = tl.exp(values - tl.max(values, 0))
        tl.store(y + row * n + column, powers / tl.sum(powers, 0), mask=inside)

    @triton.jit
    def matmul_kernel(a, b, c, m, n, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
        rows = tl.program_id(0) * M + tl.arange(0, M)
        columns = tl.program_id(1) * N + tl.arange(0, N)
        total = tl.zeros((M, N), tl.float32)
        for first in range(0, k, K):
            depth = first + tl.arange(0, K)
            left = tl.load(a + rows[:, None] * k + depth[None, :], mask=(rows[:, None] < m) & (depth[None, :] < k), other=0.0)
            right = tl.load(
                b + depth[:, None] * n + columns[None, :], mask=(depth[:, None] < k) & (columns[None, :] < n), other=0.0
            )
            total = tl.dot(left, right, total)
        inside = (rows[:, None] < m) & (columns[None, :] < n)
        tl.store(c + rows[:, None] * n + columns[None, :], total.to(c.dtype.element_ty), mask=inside)


def launch(kernel: Any, grid: tuple[int, int, int], arguments: list[Any], **options: Any) -> Report:
    """As Triton's launcher does: constants gone, two scratch pointers behind the arguments."""
    compiled = triton_aot.compiled(kernel, 80, arguments, options)
    memory, raw = Memory(), []
    for n, value in enumerate(arguments):
        if isinstance(value, torch.Tensor):
            memory.allow(value.data_ptr(), value.nbytes, f"argument {n}")
            raw.append(struct.pack("<Q", value.data_ptr()))
        elif value != 1:
            raw.append(struct.pack("<i", value))
    meta = compiled.metadata
    program = Program(compiled.asm["ptx"])
    return program.run(meta.name, grid, (32 * meta.num_warps, 1, 1), meta.shared, [*raw, bytes(8), bytes(8)], memory)


@pytest.mark.parametrize(("n", "warps"), [(1000, 4), (37, 1), (1, 2)])
def test_softmax(n: int, warps: int):
    x, y = torch.randn(5, n), torch.full((5, n), float("nan"))
    launch(softmax_kernel, (5, 1, 1), [x, y, n], BLOCK=max(64, 1 << (n - 1).bit_length()), num_warps=warps)
    torch.testing.assert_close(y, x.softmax(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stages", [1, 3])
def test_matmul(dtype: torch.dtype, stages: int):
    m, n, k = 75, 64, 96
    a, b, c = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype), torch.full((m, n), float("nan"), dtype=dtype)
    report = launch(matmul_kernel, (2, 2, 1), [a, b, c, m, n, k], M=64, N=32, K=32, num_warps=4, num_stages=stages)
    wanted = a.double() @ b.double()
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2e-3}[dtype]  # tl.dot takes fp32 as tf32
    assert np.abs(c.double() - wanted).max() <= tolerance * float(wanted.abs().max()) * 1.01
    assert any(opcode.startswith("mma.sync") for opcode in report.instructions)
