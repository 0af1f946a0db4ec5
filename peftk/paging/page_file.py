"""The file that memory is paged to: made, checked, mapped, written back, given back."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import tempfile
import weakref
from functools import cache

from peftk.paging import linux
from peftk.paging.engine import Memory

HUGE = 2 << 20  # bytes of a huge page
READ_AHEAD = 128 << 10  # bytes a call; a longer one is cut off at the device's read_ahead_kb, which is 128 unless it was set

_files: weakref.WeakSet[PageFile] = weakref.WeakSet()


class PageFile:
    """An unlinked file in ``folder`` (None: TMPDIR) and its mappings; it is closed when the last user of both is gone.

    OSError, that names the folder, where it is missing, read-only, in memory, or on a file system that can't do this.
    """

    def __init__(self, folder: str | os.PathLike | None, allow_tmpfs: bool, chunk_bytes: int) -> None:
        if not sys.platform.startswith("linux"):
            raise OSError(f"paging to a file needs Linux, this is {sys.platform}")
        self.folder, self.chunk_bytes = os.fspath(folder) if folder is not None else tempfile.gettempdir(), chunk_bytes
        self._fd = _open_unlinked(self.folder)
        weakref.finalize(self, os.close, self._fd).atexit = False
        self._end = 0
        self._mappings: dict[int, tuple[int, int]] = {}  # address: (offset in the file, bytes)
        self._is_huge = chunk_bytes % HUGE == 0
        kind = linux.filesystem_in_memory(self._fd)
        if kind and not allow_tmpfs:
            raise OSError(f"folder {self.folder} is {kind}, which is memory itself: give a folder on a disk, or allow_tmpfs=True")
        if not kind:
            self._try_out()
        _keep_forks_out()
        _files.add(self)

    def map(self, nbytes: int) -> Memory:
        """``nbytes``, whole chunks, of new room in the file, mapped. OSError where there is none."""
        place = self._end
        try:
            self.check_room(nbytes)  # first: posix_fallocate would fill the disk up before it fails
            os.posix_fallocate(self._fd, place, nbytes)
            address = linux.map_shared(self._fd, place, nbytes, HUGE if self._is_huge else os.sysconf("SC_PAGESIZE"))
        except OSError as error:
            linux.punch_hole(self._fd, place, nbytes)
            why = f"no {nbytes} bytes for paging in folder {self.folder} ({self._free()} free): {os.strerror(error.errno)}"
            raise OSError(error.errno, why) from error
        self._end += nbytes
        self._mappings[address] = (place, nbytes)
        linux.advise(address, nbytes, linux.MADV_RANDOM)
        if self._is_huge:
            self._ask_for_huge_pages(address, nbytes)
        owner = (ctypes.c_ubyte * nbytes).from_address(address)
        weakref.finalize(owner, self._unmap, address, os.getpid()).atexit = False
        return Memory(address, place, owner)

    def check_room(self, nbytes: int) -> None:
        """OSError where the disk has less."""
        if nbytes > (free := self._free()):
            why = f"no {nbytes} bytes for paging in folder {self.folder} ({free} free): {os.strerror(errno.ENOSPC)}"
            raise OSError(errno.ENOSPC, why)

    def page_in(self, address: int, nbytes: int) -> None:
        """Read and map the pages, writable, and wait for it."""
        if not self._is_huge:  # else single pages would be read one by one
            for start in range(0, nbytes, READ_AHEAD):
                linux.advise(address + start, min(READ_AHEAD, nbytes - start), linux.MADV_WILLNEED)
        linux.advise(address, nbytes, linux.MADV_POPULATE_WRITE)

    def page_out(self, address: int, place: int, nbytes: int) -> None:
        """Write the pages back and take them out of memory."""
        linux.write_back(self._fd, place, nbytes)
        linux.advise(address, nbytes, linux.MADV_DONTNEED)
        os.posix_fadvise(self._fd, place, nbytes, os.POSIX_FADV_DONTNEED)

    def make_private(self) -> None:
        """In a fork: writes no longer reach the file of the parent."""
        for address, (place, nbytes) in self._mappings.items():
            linux.map_private(self._fd, place, nbytes, address)

    def _free(self) -> int:
        facts = os.fstatvfs(self._fd)
        return facts.f_bavail * facts.f_frsize

    def _ask_for_huge_pages(self, address: int, nbytes: int) -> None:
        try:
            linux.advise(address, nbytes, linux.MADV_HUGEPAGE)
        except OSError:  # a kernel without them: EINVAL
            self._is_huge = False

    def _try_out(self) -> None:
        """Page one chunk out and see that it is gone, and that one access brings a huge page back. OSError where it stays."""
        memory = self.map(self.chunk_bytes)
        ctypes.memset(memory.address, 1, self.chunk_bytes)
        self.page_out(memory.address, memory.place, self.chunk_bytes)
        if linux.pages_in_memory(memory.address, self.chunk_bytes):
            raise OSError(f"folder {self.folder}: its file system keeps written pages in memory: set TMPDIR to one on a disk")
        if memory.owner[0] != 1:
            raise OSError(f"folder {self.folder}: a page came back with other bytes than were written: use another file system")
        self._is_huge = self._is_huge and linux.pages_in_memory(memory.address, HUGE) * os.sysconf("SC_PAGESIZE") == HUGE

    def _unmap(self, address: int, process: int) -> None:
        """Give memory and room in the file back; a fork leaves the file alone."""
        place, nbytes = self._mappings.pop(address)
        linux.unmap(address, nbytes)
        if os.getpid() == process:
            linux.punch_hole(self._fd, place, nbytes)


def _open_unlinked(folder: str) -> int:
    """A new file in ``folder`` that no path leads to."""
    try:
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:
            if not os.path.isdir(folder):
                raise
            fd, path = tempfile.mkstemp(dir=folder, prefix="peftk-paging-")  # a file system without O_TMPFILE
            os.unlink(path)
            return fd
    except OSError as error:
        raise OSError(error.errno, f"no page file can be made in folder {folder}: {os.strerror(error.errno)}") from error


@cache
def _keep_forks_out() -> None:
    os.register_at_fork(after_in_child=lambda: [file.make_private() for file in list(_files)])
