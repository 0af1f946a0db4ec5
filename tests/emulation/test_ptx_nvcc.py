"""Kernels that nvcc compiled, in the emulator, against numpy (kernels/basics.cu, kernels/tiles.cu)."""

from __future__ import annotations

import struct
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.static import nvcc
from emulation.one_instruction import run
from emulation.ptx import Memory, Program

pytestmark = pytest.mark.skipif(bool(nvcc.why_not()), reason=nvcc.why_not())
RNG = np.random.default_rng(0)


@cache
def program(name: str) -> Program:
    return Program(nvcc.compiled(Path(__file__).parent / "kernels" / f"{name}.cu", "sm_80", "ptx").read_text())


def int32(value: int) -> bytes:
    return struct.pack("<i", value)


@pytest.mark.parametrize(("n", "threads"), [(1, 32), (1000, 128), (1000, 96), (77, 50)])
def test_a_struct_of_parameters_and_a_tail(n: int, threads: int):
    x, y = RNG.standard_normal(n, np.float32), np.full(n, np.nan, np.float32)
    shifts = np.array([1.5, -2, 3], np.float32)
    struct_bytes = struct.pack("<ifQ", n, 2.5, x.ctypes.data) + shifts.tobytes() + bytes(4)
    grid, memory = (-(-n // threads), 1, 1), Memory()
    memory.allow(x.ctypes.data, x.nbytes, "x", writable=False)
    memory.allow(y.ctypes.data, y.nbytes, "y")
    report = program("basics").run("affine", grid, (threads, 1, 1), 0, [struct_bytes, struct.pack("<Q", y.ctypes.data)], memory)
    np.testing.assert_array_equal(y, np.float32(2.5) * x + shifts[np.arange(n) % 3])
    assert report.bytes_stored["global"] == 4 * n and report.bytes_loaded["global"] == 4 * n
    assert report.instructions["st.global.f32"] == n and report.threads == grid[0] * threads


def test_loops_of_different_length():
    x = np.arange(1, 600, dtype=np.uint32)
    steps = np.zeros_like(x)
    run(program("basics"), "collatz", (5, 1, 1), (128, 1, 1), [x, steps, int32(len(x))])

    def collatz(value: int) -> int:
        count = 0
        while value != 1:
            value, count = 3 * value + 1 if value & 1 else value // 2, count + 1
        return count

    assert steps.tolist() == [collatz(int(v)) for v in x]


@pytest.mark.parametrize("threads", [32, 64, 256])
def test_sums_through_shuffles_and_shared_memory(threads: int):
    x, sums = RNG.standard_normal((7, 1001), np.float32), np.zeros(7, np.float32)
    run(program("basics"), "sum_rows", (7, 1, 1), (threads, 1, 1), [x, sums, int32(1001)])
    np.testing.assert_allclose(sums, x.sum(1, dtype=np.float64), rtol=1e-4, atol=1e-4)


def test_atomics_in_shared_and_global_memory():
    x, counts = RNG.integers(0, 256, 5000, dtype=np.uint8), np.zeros(256, np.uint32)
    run(program("basics"), "histogram", (3, 1, 1), (128, 1, 1), [x, counts, int32(len(x))])
    np.testing.assert_array_equal(counts, np.bincount(x, minlength=256))


def test_local_memory():
    x = RNG.integers(-(2**31), 2**31, (128, 11), dtype=np.int32)
    y = np.zeros_like(x)
    run(program("basics"), "reverse_groups", (2, 1, 1), (64, 1, 1), [x, y, int32(11)])
    np.testing.assert_array_equal(y, x[:, ::-1])


def test_a_switch():
    which, y = RNG.integers(0, 8, 500, dtype=np.int32), np.zeros(500, np.int32)
    run(program("basics"), "choose", (4, 1, 1), (128, 1, 1), [which, y, int32(500)])
    i = np.arange(500)
    wanted = np.select([which == n for n in range(6)], [i * 3, -i, i * i, i // 7, i % 5, i ^ 0x55], 77)
    np.testing.assert_array_equal(y, wanted)


def test_constant_and_global_variables():
    x, y = RNG.standard_normal((300, 4), np.float32), np.zeros(300, np.float32)
    run(program("basics"), "weighted", (3, 1, 1), (128, 1, 1), [x, y, int32(300)])
    w = np.array([0.5, 1, 2, 4], np.float32)
    wanted = (x * w).sum(1) + w[np.arange(300) % 4]
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    assert program("basics").variables["launches"].view(np.int32)[0] == 1


def test_a_lock_that_others_wait_for():
    lock, total, order = np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(64, np.int32)
    run(program("basics"), "locked_sum", (1, 1, 1), (64, 1, 1), [lock, total, order])
    assert total[0] == 64 and sorted(order) == list(range(64))


def test_words_of_a_warp():
    x, y = RNG.integers(0, 100, 64, dtype=np.uint32), np.zeros((5, 64), np.uint32)
    run(program("basics"), "warp_words", (1, 1, 1), (64, 1, 1), [x, y])
    for n in range(2):
        v, got = x[32 * n : 32 * n + 32], y[:, 32 * n : 32 * n + 32]
        assert (got[0] == sum(int(b & 1) << i for i, b in enumerate(v))).all()
        assert (got[1] == int((v > 90).any()) + 2 * int((v < 98).all())).all()
        assert got[2].tolist() == [sum(1 << j for j in range(32) if v[j] & 3 == v[i] & 3) for i in range(32)]
        assert (got[3] == v.sum()).all()
        assert got[4].tolist() == [int(v[(32 * n + i + 3) % 20]) if i < 20 else 5 for i in range(32)]


def test_functions_of_the_cuda_library():
    x = np.concatenate([RNG.standard_normal(500) * 3, [0.25, -0.5, 3.0, 2000.0, -1500.0]]).astype(np.float32)
    x[-2:] = [20.0, -20.0]
    y = np.zeros((6, len(x)), np.float32)
    run(program("basics"), "special_functions", (4, 1, 1), (128, 1, 1), [x, y, int32(len(x))])
    d = x.astype(np.float64)
    wanted = [np.exp(d), np.log(np.abs(d)), np.sin(x * np.float32(100)), np.tanh(d), 1 / (1 + np.exp(-d)), np.sqrt(np.abs(d)) / 3]
    for got, exact in zip(y, wanted, strict=True):
        np.testing.assert_allclose(got, exact, rtol=3e-6, atol=3e-7)


def test_copies_on_their_way_while_others_are_summed():
    x, y = RNG.standard_normal((3, 5, 128), np.float32), np.zeros((3, 128), np.float32)
    report = run(program("tiles"), "sum_tiles", (3, 1, 1), (32, 1, 1), [x, y, int32(5)])
    wanted = np.zeros((3, 128), np.float32)
    for tile in range(5):
        wanted += x[:, tile]
    np.testing.assert_array_equal(y, wanted)
    assert report.bytes_loaded["global"] == x.nbytes and report.wide_share("global") == 1


@pytest.mark.parametrize("k", [16, 80])
def test_a_tile_through_ldmatrix_and_mma(k: int):
    a, b = torch.randn(16, k).bfloat16(), torch.randn(k, 16).bfloat16()
    c = np.full((16, 16), np.nan, np.float32)
    arguments = [v.view(torch.int16).numpy() for v in (a, b)]
    report = run(program("tiles"), "tile_matmul", (1, 1, 1), (32, 1, 1), [*arguments, c, int32(k)])
    np.testing.assert_allclose(c, (a.double() @ b.double()).numpy(), rtol=1e-5, atol=1e-5)
    assert report.instructions["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] == 2 * 32 * k // 16


def test_a_launch_of_four_million_elements_takes_seconds():
    """8 elements a thread; a small launch takes milliseconds. The limits leave room for a busy machine."""
    x, sums = np.ones((2048, 2048), np.float32), np.zeros(2048, np.float32)
    start = time.perf_counter()
    run(program("basics"), "sum_rows", (2048, 1, 1), (256, 1, 1), [x, sums, int32(2048)])
    assert (sums == 2048).all() and time.perf_counter() - start < 20
    start = time.perf_counter()
    run(program("basics"), "sum_rows", (4, 1, 1), (256, 1, 1), [x, sums, int32(2048)])
    assert time.perf_counter() - start < 1
