"""Bugs that the emulator has to find, each beside the kernel without it (kernels/faults.cu)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from bench.static import nvcc
from emulation.one_instruction import aligned, run
from emulation.ptx import Deadlock, Fault, InFlight, Misaligned, OutOfBounds, Program, Race, Trap, UninitialisedShared

pytestmark = pytest.mark.skipif(bool(nvcc.why_not()), reason=nvcc.why_not())
X = np.arange(100, 228, dtype=np.int32)


@cache
def program() -> Program:
    return Program(nvcc.compiled(Path(__file__).parent / "kernels" / "faults.cu", "sm_80", "ptx").read_text())


def launch(kernel: str, shared_bytes: int = 0, threads: int = 128) -> np.ndarray:
    x, y = aligned(128, np.int32), aligned(128, np.int32)
    x[:] = X
    run(program(), kernel, (2, 1, 1), (threads, 1, 1), [x, y], shared_bytes, read_only=(0,))
    return y


@pytest.mark.parametrize(
    ("kernel", "fault", "words"),
    [
        ("missing_barrier", Race, "reads what thread"),
        ("overwritten_too_soon", Race, "writes what thread"),
        ("missing_syncwarp", Race, "reads what thread"),
        ("off_by_one", OutOfBounds, "512 bytes into 'argument 1' (512 bytes)"),
        ("misaligned_vector", Misaligned, "no multiple of 16"),
        ("uninitialised_shared", UninitialisedShared, "never written"),
        ("missing_wait", InFlight, "still filling"),
        ("wait_without_barrier", Race, "reads what thread"),
        ("divergent_barrier", Deadlock, "divergent barrier"),
        ("missing_lane", Deadlock, "members of their mask"),
    ],
)
def test_a_bug_is_found(kernel: str, fault: type[Fault], words: str):
    with pytest.raises(fault) as caught:
        launch(kernel)
    found = caught.value
    assert words in str(found)
    assert found.kernel == kernel and found.instruction and found.line > 0
    assert found.block in ((0, 0, 0), (1, 0, 0)) and found.thread is not None


@pytest.mark.parametrize(
    ("kernel", "wanted"),
    [
        ("with_barrier", X[::-1]),
        ("overwritten_in_time", 2 * X[::-1] + 1),
        ("with_syncwarp", X.reshape(-1, 2)[:, ::-1].ravel()),
        ("in_bounds", X),
        ("initialised_shared", X[::-1]),
        ("with_wait", X[::-1]),
    ],
)
def test_the_same_kernel_without_it_runs(kernel: str, wanted: np.ndarray):
    np.testing.assert_array_equal(launch(kernel), wanted)


def test_an_aligned_vector_is_fine():
    np.testing.assert_array_equal(launch("aligned_vector")[:64], np.tile(X[4:8], 16))


def test_a_fault_names_thread_and_line():
    with pytest.raises(UninitialisedShared) as caught:
        launch("uninitialised_shared")
    assert caught.value.thread == (127 - 77, 0, 0) and "ld.shared.u32" in caught.value.instruction


def test_the_end_of_dynamic_shared_memory():
    np.testing.assert_array_equal(launch("beyond_shared", shared_bytes=512), X)
    with pytest.raises(OutOfBounds, match="shared address 0x1fc of 508 bytes"):
        launch("beyond_shared", shared_bytes=508)


def test_a_trap_stops_the_kernel():
    assert not launch("traps", threads=128)[0] == 0
    x, y = X.copy(), np.zeros(128, np.int32)
    x[9] = 5
    with pytest.raises(Trap) as caught:
        run(program(), "traps", (1, 1, 1), (128, 1, 1), [x, y])
    assert caught.value.thread == (9, 0, 0)


def test_a_read_only_range_stays_as_it_is():
    x, y = X.copy(), np.zeros(128, np.int32)
    with pytest.raises(OutOfBounds, match="'argument 1' at byte 0 of 512, read-only"):
        run(program(), "in_bounds", (1, 1, 1), (128, 1, 1), [x, y], read_only=(1,))
    assert not y.any()


def test_nothing_beside_the_ranges_is_touched():
    """A view in the middle of an array, whose neighbours keep their bytes."""
    whole = np.full(160, 7, np.int32)
    run(program(), "in_bounds", (1, 1, 1), (128, 1, 1), [X.copy(), whole[16:144]])
    assert (whole[:16] == 7).all() and (whole[144:] == 7).all() and (whole[16:144] == X).all()


def test_a_tensor_may_come_twice():
    y = X.copy()
    run(program(), "in_bounds", (1, 1, 1), (128, 1, 1), [y, y])
    np.testing.assert_array_equal(y, X)


def test_one_writer_a_byte_is_checked_on_demand():
    launch("two_writers")
    x, y = X.copy(), np.zeros(128, np.int32)
    for kernel in ("in_bounds", "two_writers_of_one_value"):
        run(program(), kernel, (1, 1, 1), (128, 1, 1), [x, y], one_writer=True)
    with pytest.raises(Race, match="another value than another thread stored inside 'argument 1' at byte 0"):
        run(program(), "two_writers", (1, 1, 1), (128, 1, 1), [x, y], one_writer=True)


def test_one_writer_a_byte_from_batch_to_batch():
    x, y = np.arange(32768, dtype=np.int32), np.zeros(16384, np.int32)
    run(program(), "far_apart", (128, 1, 1), (128, 1, 1), [x, y], one_writer=True)
    with pytest.raises(Race) as caught:
        run(program(), "far_apart", (256, 1, 1), (128, 1, 1), [x, y], one_writer=True)
    assert caught.value.block == (128, 0, 0)


def test_one_writer_a_byte_from_block_to_block():
    """Both blocks of a launch write y, from different x."""
    x, y = np.arange(256, dtype=np.int32), np.zeros(128, np.int32)
    run(program(), "blocks_meet", (2, 1, 1), (128, 1, 1), [x, y])
    with pytest.raises(Race, match="another value"):
        run(program(), "blocks_meet", (2, 1, 1), (128, 1, 1), [x, y], one_writer=True)
