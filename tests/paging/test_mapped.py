"""Paging to a mapped file: residency by mincore, values by a copy in memory, errors before anything is written."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from peftk import paging
from peftk.paging import linux, mapped, page_file
from peftk.paging.pager import Pager

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="paging to a file needs Linux")
MB = 1 << 20
PAGE = os.sysconf("SC_PAGESIZE")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on a disk."""
    for place in (tmp_path_factory.mktemp("paging"), Path(__file__).parent):
        with open(place / "trial", "w+b") as file:
            kind = linux.filesystem_in_memory(file.fileno())
        os.unlink(place / "trial")
        if not kind:
            return place
    pytest.skip("no folder on a disk")


def in_memory(pager: Pager) -> int:
    """Bytes of the pager's memory that mincore finds, moves under way having ended."""
    slabs = pager._store._slabs
    for chunk in (chunk for slab in slabs for chunk in slab.chunks):
        if chunk.moving is not None:
            chunk.moving.exception()
    return sum(linux.pages_in_memory(slab.address, slab.nbytes) for slab in slabs) * PAGE


def slices(tensor: torch.Tensor, elements: int) -> list[torch.Tensor]:
    return list(tensor.split(elements))


def step(pager: Pager, groups: list[list[torch.Tensor]], amount: float, measure: bool = False) -> int:
    """``amount`` is added to every group, the next one announced; the most bytes that were in memory, if asked for."""
    most = 0
    for group, following in zip(groups, [*groups[1:], groups[0]], strict=True):
        with pager.resident(group, upcoming=following) as here:
            for tensor in here:
                tensor.add_(amount)
            if measure:
                most = max(most, in_memory(pager))
    return most


def test_a_new_tensor_is_zero_and_ours(folder: Path):
    pager = Pager("cpu", folder=folder)
    for shape, dtype in (((3, 5), torch.float32), (7, torch.uint8), ((), torch.bfloat16), ((2, 0), torch.float32)):
        tensor = pager.empty(shape, dtype)
        assert tensor.dtype == dtype and not tensor.any() and tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tuple(tensor.shape) == ((shape,) if isinstance(shape, int) else shape)
        with pager.resident([tensor]):
            tensor.fill_(1)
        assert (tensor in pager) == bool(tensor.numel())
    assert torch.ones(3) not in pager


@pytest.mark.parametrize("budget", [8 * MB, 36 * MB], ids=["single pages", "huge pages"])
def test_values_are_those_of_memory_and_residency_is_under_the_budget(folder: Path, budget: int):
    pager = Pager("cpu", budget, folder)
    states = [pager.empty(2 * budget // 6 // 4, torch.float32) for _ in range(6)]
    plain = [torch.zeros_like(state) for state in states]
    groups = [[piece] for state in states for piece in slices(state, budget // 4 // 4)]
    for i in range(4):
        most = step(pager, groups, i + 0.5, measure=True)
        assert most <= budget
        for tensor in plain:
            tensor.add_(i + 0.5)
    assert most > budget // 2
    found = pager.stats()
    assert found.resident <= budget and found.paged_out >= budget // 2
    assert found.bytes_out > budget and found.bytes_in > budget
    assert found.hit_rate > 0.9, found
    assert all(torch.equal(a, b) for a, b in zip(states, plain, strict=True))


def test_what_was_not_announced_is_a_fault(folder: Path):
    pager = Pager("cpu", 2 * MB, folder)
    states = [pager.empty(MB // 4, torch.float32) for _ in range(4)]
    for i in range(3):
        for state in states:
            with pager.resident([state]):
                state.add_(1)
        faults = pager.stats().faults
        assert (faults > 0) == (i > 0)
    assert pager.stats().prefetched == 0 and pager.stats().hit_rate == 0.0
    assert all((state == 3).all() for state in states)


def test_random_walks_lose_nothing(folder: Path):
    """Tensors of all sizes, in an order that the window can't guess, announced rightly, wrongly or not at all."""
    generator = torch.Generator().manual_seed(0)
    pager = Pager("cpu", 2 * MB, folder)
    sizes = torch.randint(1, 100_000, (40,), generator=generator).tolist()
    states = [pager.empty(size, torch.float32) for size in sizes]
    plain = [torch.zeros(size) for size in sizes]
    for value in range(200):
        i, j = torch.randint(0, 40, (2,), generator=generator).tolist()
        with pager.resident([states[i]], upcoming=[states[j]]):
            states[i].mul_(0.5).add_(value)
        plain[i].mul_(0.5).add_(value)
    assert in_memory(pager) <= 2 * MB
    assert all(torch.equal(a, b) for a, b in zip(states, plain, strict=True))


def test_enough_budget_moves_nothing(folder: Path):
    pager = Pager("cpu", 64 * MB, folder)
    states = [[pager.empty(MB, torch.float32)] for _ in range(4)]
    for _ in range(3):
        step(pager, states, 1.0)
    assert pager.stats().bytes_out == pager.stats().bytes_in == pager.stats().faults == 0


def test_memory_and_room_on_the_disk_go_with_the_tensors(folder: Path):
    pager = Pager("cpu", 8 * MB, folder)
    file = pager._store.engine._file
    before = os.fstat(file._fd).st_blocks
    states = [pager.empty(MB, torch.float32) for _ in range(6)]
    step(pager, [[piece] for state in states for piece in slices(state, MB // 4)], 1.0)
    assert os.fstat(file._fd).st_blocks * 512 >= 24 * MB
    address = states[0].data_ptr()
    assert in_memory(pager) <= 8 * MB
    del states
    gc.collect()
    assert pager.stats().resident == pager.stats().paged_out == 0
    assert os.fstat(file._fd).st_blocks - before < MB // 512
    with pytest.raises(OSError, match="mincore"):
        linux.pages_in_memory(address, PAGE)


def test_tensors_outlive_their_pager(folder: Path):
    pager = Pager("cpu", 8 * MB, folder)
    state = pager.empty(4 * MB, torch.float32)
    step(pager, [[piece] for piece in slices(state, MB // 4)], 2.0)
    fd = pager._store.engine._file._fd
    pager.close()
    with pytest.raises(RuntimeError, match="this pager is closed"):
        pager.empty(1, torch.float32)
    assert (state == 2).all()
    del pager, state
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(fd)


def test_no_name_in_the_folder_leads_to_the_file_even_after_a_kill(folder: Path):
    code = (
        "import sys, torch; from peftk.paging import Pager; p = Pager('cpu', 1 << 20, sys.argv[1]);"
        "t = p.empty(1 << 20, torch.float32)\nwith p.resident([t[:9]]): t[:9] = 1\nprint('up', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(page_file.__file__).parents[2],
    )
    assert child.stdout.readline() == b"up\n"
    assert not list(folder.glob("*"))
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not list(folder.glob("*"))


def test_without_o_tmpfile_the_file_is_unlinked_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.open

    def refuse(path, flags, *rest, **options):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    pager = Pager("cpu", MB, folder)
    assert not list(folder.glob("*"))
    assert not pager.empty(5, torch.float32).any()


def test_a_fork_reads_but_never_writes_the_parents_pages(folder: Path):
    pager = Pager("cpu", MB, folder)
    state = pager.empty(MB // 4, torch.float32)
    state.fill_(3.0)
    read, write = os.pipe()
    if not (child := os.fork()):
        said = b"silence"
        try:
            with pager.resident([state]):
                said = b"let in"
        except RuntimeError as error:
            said = str(error).encode()
        same = state[0].item() == 3.0
        ctypes.memset(state.data_ptr(), 0, state.nbytes)
        os.write(write, said + (b" same" if same else b" other"))
        os._exit(0)
    os.waitpid(child, 0)
    said = os.read(read, 1000).decode()
    assert said == f"this pager belongs to process {os.getpid()}, not to {child}: make one in this process same"
    assert (state == 3.0).all()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"budget": 0}, r"budget=0: expected a positive number of bytes, or None"),
        ({"budget": 1.5}, r"budget=1.5: expected"),
        ({"device": "meta"}, r"device='meta': expected cpu or a CUDA device"),
    ],
)
def test_bad_arguments(argument: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Pager(**{"device": "cpu", **argument})


def test_bad_tensors(folder: Path):
    pager = Pager("cpu", 64 * PAGE, folder)
    state = pager.empty((64, PAGE), torch.float32)
    for tensors, upcoming, message in (
        ([torch.ones(3)], [], r"tensors\[0\], shape \(3,\): expected a tensor made by this pager's empty\(\)"),
        ([state[:1]], [state[1:2], torch.ones(2)], r"upcoming\[1\], shape \(2,\): expected a tensor made by"),
        ([state[:2, :9]], [], r"tensors\[0\]: expected a contiguous tensor, got strides \(4096, 1\)"),
        ([state], [], rf"tensors lie on {256 * PAGE} bytes of whole chunks, the budget is {64 * PAGE}: pass fewer or slices"),
    ):
        with pytest.raises(ValueError, match=message), pager.resident(tensors, upcoming):
            pass
    with pager.resident([state[:1]]):
        state[:1] = 1


def test_folders_that_will_not_do(folder: Path):
    with pytest.raises(OSError, match=rf"no page file can be made in folder {folder}/none: No such file or directory"):
        Pager("cpu", folder=folder / "none")
    (folder / "file").touch()
    with pytest.raises(OSError, match=rf"no page file can be made in folder {folder}/file: Not a directory"):
        Pager("cpu", folder=folder / "file")
    (folder / "file").unlink()
    with pytest.raises(OSError, match=r"no page file can be made in folder /proc: "):
        Pager("cpu", folder="/proc")


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no tmpfs at /dev/shm")
def test_tmpfs_is_memory():
    with pytest.raises(
        OSError, match=r"folder /dev/shm is tmpfs, which is memory itself: give a folder on a disk, or allow_tmpfs"
    ):
        Pager("cpu", folder="/dev/shm")
    pager = Pager("cpu", MB, "/dev/shm", allow_tmpfs=True)
    state = pager.empty(MB, torch.float32)
    step(pager, [[piece] for piece in slices(state, MB // 16)], 2.0)
    assert (state == 2).all()


def test_no_room_is_an_error_before_anything_is_written(folder: Path):
    """A limit on a file's size stands for a full disk: both come from posix_fallocate."""
    pager = Pager("cpu", 16 * MB, folder)
    state = pager.empty(MB, torch.float32)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 * MB, old[1]))
    try:
        with pytest.raises(OSError, match=rf"no {64 * MB} bytes for paging in folder {folder} \(\d+ free\): File too large"):
            pager.empty(16 * MB, torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    with pager.resident([state]):
        state.add_(1)
    assert (state == 1).all()
    free = os.statvfs(folder)
    with pytest.raises(OSError, match=r"for paging in folder .* No space left on device"):
        pager.empty(free.f_blocks * free.f_frsize * 2, torch.uint8)


def test_a_file_system_that_keeps_pages_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)
    with pytest.raises(OSError, match=r"its file system keeps written pages in memory: set TMPDIR"):
        Pager("cpu", folder=folder)


def test_a_failed_write_is_raised_and_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    pager = Pager("cpu", MB, folder)
    state = pager.empty(MB, torch.float32)
    groups = [[piece] for piece in slices(state, MB // 16)]
    step(pager, groups, 1.0)
    real, calls = linux.write_back, []

    def fail(fd: int, offset: int, length: int) -> None:
        calls.append(offset)
        if len(calls) == 3:
            raise OSError(errno.EIO, "sync_file_range: Input/output error")
        real(fd, offset, length)

    monkeypatch.setattr(linux, "write_back", fail)
    with pytest.raises(OSError, match="sync_file_range: Input/output error"):
        for _ in range(2):
            step(pager, groups, 0.0)
    step(pager, groups, 0.0)
    assert (state == 1).all()


def test_the_default_pager_and_stats_of_all(folder: Path, monkeypatch: pytest.MonkeyPatch):
    gc.collect()
    monkeypatch.setattr(page_file.tempfile, "gettempdir", lambda: str(folder))
    before = paging.stats()
    a = paging.empty((MB, 2), torch.float32, "cpu", budget=4 * MB)
    b = paging.empty(3, torch.float32, "cpu", budget=4 * MB)
    for piece in slices(a, MB // 8):
        with paging.resident([piece, b]):
            piece.add_(1)
            b.add_(1)
    assert (a == 1).all() and (b == 8).all()
    assert 0 < paging.stats().resident - before.resident <= 4 * MB and paging.stats().paged_out >= 4 * MB
    with pytest.raises(ValueError, match=r"tensors: expected at least one tensor, made by peftk.paging.empty or a Pager"):
        paging.resident([torch.ones(3)])


def test_the_body_runs_while_the_next_is_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch):
    pager = Pager("cpu", 4 * MB, folder)
    state = pager.empty(4 * MB, torch.float32)
    groups = [[piece] for piece in slices(state, MB // 4)]
    step(pager, groups, 1.0)
    real = page_file.PageFile.page_in

    def slow(self, address: int, nbytes: int) -> None:
        time.sleep(0.01)
        real(self, address, nbytes)

    monkeypatch.setattr(page_file.PageFile, "page_in", slow)
    waits = []
    for group, following in zip(groups, [*groups[1:], groups[0]], strict=True):
        begin = time.perf_counter()
        with pager.resident(group, upcoming=following):
            waits.append(time.perf_counter() - begin)
            time.sleep(0.05)
    assert sorted(waits)[len(waits) // 2] < 0.01, waits


def test_the_chunks_of_a_budget():
    for budget, size in ((None, 2 * MB), (1 << 40, 2 * MB), (16 * MB, MB), (1, PAGE)):
        assert mapped.chunk_bytes(budget) == size
