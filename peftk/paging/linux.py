"""The system calls of paging that Python doesn't have, by ctypes: mapping, advice, write-back, holes, the kind of a file system.

Each raises OSError with errno. Other Python threads run meanwhile.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

MADV_RANDOM, MADV_WILLNEED, MADV_DONTNEED, MADV_HUGEPAGE, MADV_POPULATE_WRITE = 1, 3, 4, 14, 23  # asm-generic/mman-common.h
_PROT_NONE, _PROT_READ_WRITE = 0, 1 | 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
_SYNC_FILE_RANGE_ALL = 1 | 2 | 4  # wait for writes under way, write, wait
_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2
_IN_MEMORY = {0x01021994: "tmpfs", 0x858458F6: "ramfs", 0x958458F6: "hugetlbfs"}  # linux/magic.h

_size, _off, _int = ctypes.c_size_t, ctypes.c_int64, ctypes.c_int


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = _size
    libc.mmap.argtypes = (_size, _size, _int, _int, _int, _off)
    libc.munmap.argtypes = (_size, _size)
    libc.madvise.argtypes = (_size, _size, _int)
    libc.mincore.argtypes = (_size, _size, ctypes.c_char_p)
    libc.sync_file_range.argtypes = (_int, _off, _off, ctypes.c_uint)
    libc.fallocate.argtypes = (_int, _int, _off, _off)
    libc.fstatfs.argtypes = (_int, ctypes.c_void_p)
    return libc


def _check(result: int, call: str) -> None:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")


def _mmap(address: int, length: int, protection: int, flags: int, fd: int, offset: int) -> int:
    found = _libc().mmap(address, length, protection, flags, fd, offset)
    _check(-1 if found == _size(-1).value else 0, "mmap")
    return found


def map_shared(fd: int, offset: int, length: int, alignment: int) -> int:
    """Where ``length`` bytes of the file from ``offset`` are mapped, readable and writable: a multiple of ``alignment``, itself
    one of the page size."""
    reserved = _mmap(0, length + alignment, _PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
    address = -(-reserved // alignment) * alignment
    try:
        _mmap(address, length, _PROT_READ_WRITE, _MAP_SHARED | _MAP_FIXED, fd, offset)
    except OSError:
        unmap(reserved, length + alignment)
        raise
    if address > reserved:
        unmap(reserved, address - reserved)
    if rest := reserved + alignment - address:
        unmap(address + length, rest)
    return address


def map_private(fd: int, offset: int, length: int, address: int) -> None:
    """The same bytes in the place of a shared mapping; what is written from now on stays in this process."""
    _mmap(address, length, _PROT_READ_WRITE, _MAP_PRIVATE | _MAP_FIXED, fd, offset)


def unmap(address: int, length: int) -> None:
    _check(_libc().munmap(address, length), "munmap")


def advise(address: int, length: int, advice: int) -> None:
    _check(_libc().madvise(address, length, advice), "madvise")


def pages_in_memory(address: int, length: int) -> int:
    """How many of the pages are in memory, mapped or in the page cache."""
    pages = ctypes.create_string_buffer(-(-length // os.sysconf("SC_PAGESIZE")))
    _check(_libc().mincore(address, length, pages), "mincore")
    return sum(byte & 1 for byte in pages.raw[: len(pages)])


def write_back(fd: int, offset: int, length: int) -> None:
    """Write the file's dirty pages to the disk and wait for it."""
    _check(_libc().sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_ALL), "sync_file_range")


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the file's room there back. Where the file system can't, it stays until the file is closed."""
    _libc().fallocate(fd, _FALLOC_KEEP_SIZE | _FALLOC_PUNCH_HOLE, offset, length)


def filesystem_in_memory(fd: int) -> str:
    """Name of the file's file system where that is memory (tmpfs, ramfs, hugetlbfs), else an empty string."""
    facts = (ctypes.c_long * 64)()  # struct statfs begins with f_type
    _check(_libc().fstatfs(fd, ctypes.addressof(facts)), "fstatfs")
    return _IN_MEMORY.get(facts[0] & 0xFFFFFFFF, "")
