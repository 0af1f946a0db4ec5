"""Paging on a CPU: tensors over a file that is mapped into memory.

One sparse file a pager, unlinked as it is made: no other process can open it, and it goes with the process, however that ends.
Leaving memory is three steps, since MADV_DONTNEED alone keeps a shared file's pages in the page cache and MADV_PAGEOUT leaves
dirty ones: write back, unmap the pages, drop them from the cache.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from peftk.paging import linux
from peftk.paging.engine import Memory
from peftk.paging.window import Chunk


class MappedFile:
    """The engine; see ``peftk.paging.engine.Engine``. Moves run on one thread of its own, in the order they were asked for."""

    granule = os.sysconf("SC_PAGESIZE") if hasattr(os, "sysconf") else 4096

    def __init__(self, folder: str | os.PathLike | None, allow_tmpfs: bool) -> None:
        self._file = PageFile(folder, allow_tmpfs)
        self._mover = ThreadPoolExecutor(1, "peftk-paging")

    def allocate(self, nbytes: int) -> Memory:
        length = -(-nbytes // self.granule) * self.granule
        address, owner = self._file.map(length)
        return Memory(address, length, torch.frombuffer(owner, dtype=torch.uint8), owner)

    def move(self, out: Sequence[Chunk], into: Sequence[Chunk]) -> Future:
        return self._mover.submit(self._file.move, list(runs(out)), list(runs(c for c in into if c.stored)))

    def wait(self, handles: Iterable[Future]) -> None:
        for handle in handles:
            handle.result()

    def used(self, chunks: Sequence[Chunk]) -> None:
        """Nothing to mark: on a CPU the work is done when the body ends."""

    def close(self) -> None:
        self._mover.shutdown(wait=False)


class PageFile:
    """An unlinked file and its mappings. It is closed when the last mapping and the engine are gone."""

    def __init__(self, folder: str | os.PathLike | None, allow_tmpfs: bool) -> None:
        if not sys.platform.startswith("linux"):
            raise OSError(f"paging to a file needs Linux, this is {sys.platform}")
        self.folder = os.fspath(folder) if folder is not None else tempfile.gettempdir()
        self._fd = _open_unlinked(self.folder)
        weakref.finalize(self, os.close, self._fd).atexit = False
        self._check_filesystem(allow_tmpfs)
        self._end = 0
        self._offsets: dict[int, tuple[int, int]] = {}

    def _check_filesystem(self, allow_tmpfs: bool) -> None:
        kind = linux.filesystem_in_memory(self._fd)
        if kind and not allow_tmpfs:
            raise OSError(f"folder {self.folder} is {kind}, which is memory itself: give a folder on a disk, or allow_tmpfs=True")

    def map(self, length: int) -> tuple[int, ctypes.Array]:
        """``length`` zeroed bytes of new room in the file, mapped: where, and the object that keeps the mapping alive."""
        offset = self._end
        try:
            os.posix_fallocate(self._fd, offset, length)
            address = linux.map_shared(self._fd, offset, length)
        except OSError as error:
            free = os.fstatvfs(self._fd)
            raise OSError(
                error.errno,
                f"can't page {length} bytes to folder {self.folder} ({free.f_bavail * free.f_frsize} bytes free): "
                f"{os.strerror(error.errno)}",
            ) from error
        self._end += length
        self._offsets[address] = (offset, length)
        linux.advise(address, length, linux.MADV_RANDOM)  # no readahead beyond what is asked for
        owner = (ctypes.c_ubyte * length).from_address(address)
        weakref.finalize(owner, self._unmap, address, os.getpid()).atexit = False
        return address, owner

    def _unmap(self, address: int, pid: int) -> None:
        """Give the room in the file back, but for a fork, whose file it isn't."""
        offset, length = self._offsets.pop(address)
        linux.unmap(address, length)
        if os.getpid() == pid:
            linux.punch_hole(self._fd, offset, length)

    def move(self, out: list[tuple[int, int]], into: list[tuple[int, int]]) -> None:
        for address, nbytes in out:
            self._page_out(address, nbytes)
        for address, nbytes in into:
            linux.read_ahead(address, nbytes)

    def _page_out(self, address: int, nbytes: int) -> None:
        offset = self._offset(address)
        linux.write_back(self._fd, offset, nbytes)
        linux.advise(address, nbytes, linux.MADV_DONTNEED)
        os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def _offset(self, address: int) -> int:
        return next(o + address - a for a, (o, n) in self._offsets.items() if a <= address < a + n)


def runs(chunks: Iterable[Chunk]) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the chunks, neighbours joined."""
    start = end = None
    for chunk in sorted(chunks, key=lambda c: c.address):
        if chunk.address != end:
            if start is not None:
                yield start, end - start
            start = chunk.address
        end = chunk.address + chunk.nbytes
    if start is not None:
        yield start, end - start


def _open_unlinked(folder: str) -> int:
    """A new file in ``folder`` that no path leads to. OSError that names the folder."""
    try:
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
                raise error
            fd, path = tempfile.mkstemp(dir=folder, prefix="peftk-paging-")  # a file system without O_TMPFILE
            os.unlink(path)
            return fd
    except OSError as error:
        raise OSError(error.errno, f"no page file can be made in folder {folder}: {os.strerror(error.errno)}") from error
