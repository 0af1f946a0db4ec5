"""The system calls of paging that Python doesn't have, by ctypes: mapping, advice, write-back, holes, the kind of a file system.

Each raises OSError with errno. ctypes lets other Python threads run meanwhile.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

MADV_RANDOM, MADV_WILLNEED, MADV_DONTNEED = 1, 3, 4  # asm-generic/mman-common.h
_PROT_READ_WRITE, _MAP_SHARED = 1 | 2, 1
_SYNC_FILE_RANGE_ALL = 1 | 2 | 4  # wait before, write, wait after
_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2
_IN_MEMORY = {0x01021994: "tmpfs", 0x858458F6: "ramfs", 0x958458F6: "hugetlbfs"}  # linux/magic.h
READ_AHEAD = 128 << 10  # bytes a call; the kernel cuts a longer one off at the device's read_ahead_kb, whose default this is

_long, _size, _off, _int = ctypes.c_long, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = _size
    libc.mmap.argtypes = (_size, _size, _int, _int, _int, _off)
    libc.munmap.argtypes = (_size, _size)
    libc.madvise.argtypes = (_size, _size, _int)
    libc.sync_file_range.argtypes = (_int, _off, _off, ctypes.c_uint)
    libc.fallocate.argtypes = (_int, _int, _off, _off)
    libc.fstatfs.argtypes = (_int, ctypes.c_void_p)
    return libc


def _check(result: int, call: str) -> None:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")


def map_shared(fd: int, offset: int, length: int) -> int:
    """Where ``length`` bytes of the file from ``offset`` are mapped, readable and writable, shared with the file."""
    address = _libc().mmap(0, length, _PROT_READ_WRITE, _MAP_SHARED, fd, offset)
    _check(-1 if address == ctypes.c_size_t(-1).value else 0, "mmap")
    return address


def unmap(address: int, length: int) -> None:
    _check(_libc().munmap(address, length), "munmap")


def advise(address: int, length: int, advice: int) -> None:
    _check(_libc().madvise(address, length, advice), "madvise")


def write_back(fd: int, offset: int, length: int) -> None:
    """Write the file's dirty pages to the disk and wait for it."""
    _check(_libc().sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_ALL), "sync_file_range")


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the file's room there back. Without support in the file system it stays until the file is closed."""
    _libc().fallocate(fd, _FALLOC_KEEP_SIZE | _FALLOC_PUNCH_HOLE, offset, length)


def read_ahead(address: int, length: int) -> None:
    """Start to read mapped pages into memory."""
    for start in range(0, length, READ_AHEAD):
        advise(address + start, min(READ_AHEAD, length - start), MADV_WILLNEED)


def filesystem_in_memory(fd: int) -> str:
    """Name of the file's file system where that is memory (tmpfs, ramfs, hugetlbfs), else an empty string."""
    facts = (_long * 64)()  # struct statfs begins with f_type
    _check(_libc().fstatfs(fd, ctypes.addressof(facts)), "fstatfs")
    return _IN_MEMORY.get(facts[0] & 0xFFFFFFFF, "")
