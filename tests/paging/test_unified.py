"""Paging on a GPU against a mock of the driver that puts work off, counts faults and refuses calls. See mock_driver.cpp."""

from __future__ import annotations

import ctypes
import gc
import logging
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from peftk.paging import unified
from peftk.paging.chunked import ChunkedStore
from peftk.paging.driver import Driver
from peftk.paging.pager import Pager
from peftk.paging.unified import UnifiedMemory

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the mock driver needs g++")
KB = 1 << 10
BUDGET, LIMIT = 1024 * KB, 1024 * KB
COUNTS = ("faults", "errors", "bytes_in", "bytes_out", "device_bytes", "peak", "allocations")
CPU = torch.device("cpu")


class Mock:
    mode: int  # 0: work waits until it is waited for; 1: side streams run ahead

    def __init__(self, path: Path) -> None:
        self.driver = Driver(str(path))
        self.library = self.driver._library
        self.library.mock_add.argtypes = (ctypes.c_uint64, ctypes.c_size_t, ctypes.c_float)
        self.library.mock_reset.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long)
        self.library.mock_count.restype = self.library.mock_calls.restype = ctypes.c_long

    def add(self, tensor: torch.Tensor, value: float) -> None:
        """The kernel: put on the current stream, done later."""
        self.library.mock_add(tensor.data_ptr(), tensor.numel(), value)

    def counts(self) -> dict[str, int]:
        return {name: self.library.mock_count(i) for i, name in enumerate(COUNTS)}

    def pager(self, budget: int | None = BUDGET, engine: type[UnifiedMemory] | None = None) -> Pager:
        if engine is None:
            return Pager(CPU, budget, store=unified.store_over(self.driver, 0, budget, lambda: 0, CPU))
        return Pager(CPU, budget, store=ChunkedStore(engine(self.driver, 0, budget, lambda: 0, CPU), budget))


@pytest.fixture(scope="module", params=["V1", "V2"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mock") / f"{request.param}.so"
    source = Path(__file__).with_name("mock_driver.cpp")
    subprocess.run(["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-D{request.param}", source, "-o", path], check=True)
    return path


@pytest.fixture(params=["lazy", "eager"])
def mock(library: Path, request: pytest.FixtureRequest) -> Mock:
    gc.collect()
    mock = Mock(library)
    mock.mode = ["lazy", "eager"].index(request.param)
    mock.library.mock_reset(mock.mode, 1, LIMIT)
    return mock


def train(mock: Mock, pager: Pager, steps: int = 4) -> list[torch.Tensor]:
    """Four tensors, twice the budget together, worked through in slices."""
    states = [pager.empty(BUDGET // 2 // 4, torch.float32) for _ in range(4)]
    groups = [[piece] for state in states for piece in state.split(BUDGET // 4 // 4)]
    for i in range(steps):
        for group, following in zip(groups, [*groups[1:], groups[0]], strict=True):
            with pager.resident(group, upcoming=following) as here:
                mock.add(here[0], i + 1.0)
    mock.library.mock_sync()
    return states


def right(states: list[torch.Tensor], steps: int = 4) -> bool:
    return all((state == steps * (steps + 1) / 2).all() for state in states)


def test_each_kernel_finds_its_pages_and_the_budget_holds(mock: Mock):
    pager = mock.pager()
    states = train(mock, pager)
    found, counts = pager.stats(), mock.counts()
    assert right(states)
    assert counts["faults"] == counts["errors"] == 0
    assert counts["peak"] <= BUDGET
    assert found.bytes_out == counts["bytes_out"] > 0
    assert found.faults == 0 and found.prefetched > 0
    del states, pager
    gc.collect()
    assert mock.counts()["allocations"] == mock.counts()["device_bytes"] == 0


def test_enough_budget_moves_everything_once(mock: Mock):
    mock.library.mock_reset(mock.mode, 1, 8 * BUDGET)
    states = train(mock, mock.pager(8 * BUDGET))
    assert right(states) and mock.counts()["bytes_out"] == 0


class WaitsForNoArrival(UnifiedMemory):
    def wait(self, chunks):
        return None


class MarksNoUse(UnifiedMemory):
    def used(self, chunks):
        return None


class FetchesTheNeighbour(UnifiedMemory):
    def _prefetch(self, chunks, device, stream):
        for chunk in chunks:
            self._driver.prefetch(chunk.address + self.chunk_bytes, self.chunk_bytes, device, stream)


@pytest.mark.parametrize("engine", [WaitsForNoArrival, MarksNoUse, FetchesTheNeighbour])
def test_the_mock_sees_these_bugs(library: Path, engine: type[UnifiedMemory]):
    mock, seen = Mock(library), 0
    for mode in (0, 1):
        mock.library.mock_reset(mode, 1, LIMIT)
        states = train(mock, mock.pager(engine=engine))
        seen += mock.counts()["faults"] + mock.counts()["errors"]
        del states
    assert seen


def test_the_mock_sees_memory_freed_too_early(mock: Mock, monkeypatch: pytest.MonkeyPatch):
    def use_and_drop() -> int:
        state = mock.pager().empty(1000, torch.float32)
        mock.add(state, 1.0)
        del state
        gc.collect()
        mock.library.mock_sync()
        return mock.counts()["errors"]

    assert use_and_drop() == 0
    monkeypatch.setattr(Driver, "free", lambda self, address, call="cuMemFree_v2": self.call(call, address))
    assert use_and_drop() > 0


@pytest.mark.parametrize(("call", "what"), [("cuMemPrefetchAsync", "prefetch"), ("cuMemAdvise", "advice")])
@pytest.mark.parametrize("after", [0, 5])
def test_what_is_refused_is_done_without(mock: Mock, call: str, what: str, after: int, caplog: pytest.LogCaptureFixture):
    for name in (call, f"{call}_v2"):
        mock.library.mock_fail(name.encode(), 801, 0 if what == "advice" else after)
    with caplog.at_level(logging.WARNING, "peftk"):
        states = train(mock, mock.pager())
    assert right(states) and mock.counts()["errors"] == 0
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and said[0].startswith(f"paging goes on without {what}, more slowly: {call}")
    assert "operation not supported (CUDA error 801)" in said[0]


def test_no_managed_memory(mock: Mock):
    pager = mock.pager()
    mock.library.mock_fail(b"cuMemAllocManaged", 2, 0)
    with pytest.raises(MemoryError, match=r"no \d+ bytes of managed memory: cuMemAllocManaged: out of memory \(CUDA error 2\)"):
        pager.empty(10, torch.float32)


def test_a_broken_device_is_no_refusal(mock: Mock):
    for name in (b"cuMemPrefetchAsync", b"cuMemPrefetchAsync_v2"):
        mock.library.mock_fail(name, 700, 0)
    with pytest.raises(RuntimeError, match=r"cuMemPrefetchAsync\w*: failure \(CUDA error 700\)"):
        train(mock, mock.pager())


def test_without_concurrent_access_two_pinned_buffers(mock: Mock):
    mock.library.mock_reset(mock.mode, 0, LIMIT)
    pager = mock.pager()
    states = train(mock, pager)
    assert right(states) and mock.counts()["errors"] == 0
    assert mock.counts()["peak"] <= BUDGET
    assert pager.stats().faults == 1 and pager.stats().prefetched == 31
    with pytest.raises(ValueError, match=r"tensors take 1048576 bytes, they may take half the budget, 524288"):
        with pager.resident(states[:2]):
            pass
    with (
        pager.resident(states[:1], upcoming=states[:1]),
        pytest.raises(ValueError, match=r"tensors\[0\], shape \(3,\): expected"),
    ):
        with pager.resident([torch.ones(3)]):
            pass
    del states, pager
    gc.collect()
    assert mock.counts()["allocations"] == mock.counts()["device_bytes"] == 0


def test_a_copy_fetched_ahead_is_not_used_after_a_change(mock: Mock):
    mock.library.mock_reset(mock.mode, 0, LIMIT)
    pager = mock.pager()
    a, b = (pager.empty(1000, torch.float32) for _ in range(2))
    with pager.resident([a], upcoming=[b]):
        pass
    with pager.resident([a, b], upcoming=[]) as here:
        mock.add(here[1], 1.0)
    with pager.resident([b]) as here:
        mock.add(here[0], 1.0)
    mock.library.mock_sync()
    assert (b == 2).all()


def test_no_pinned_memory(mock: Mock):
    mock.library.mock_reset(mock.mode, 0, LIMIT)
    pager = mock.pager()
    mock.library.mock_fail(b"cuMemHostAlloc", 2, 0)
    with pytest.raises(MemoryError, match=r"no 40 bytes of pinned memory: cuMemHostAlloc: out of memory"):
        pager.empty(10, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(RuntimeError, match=r"device='cuda': torch .* sees no GPU"):
        Pager("cuda")
