"""Folders that can't be written to, each in a process of its own whose mounts nobody else sees, and which go with it.

A full disk is a small tmpfs with a ballast; a read-only one is the same, mounted again. ``why_no_mounts`` says where a process
may not mount. Limits on the size of files and on memory need nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import os
import resource
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

_NEWUSER, _NEWNS = 0x10000000, 0x00020000  # sched.h
_RDONLY, _REMOUNT, _REC, _PRIVATE = 1, 32, 16384, 1 << 18  # sys/mount.h
PRELOAD = "tests.reliability.no_room"
SECONDS = 300


def in_process(work: Callable[..., object], *arguments: object) -> None:
    """Run it in a process of its own. AssertionError with its traceback where it fails."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_told, args=(theirs, work, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        said = ours.recv() if ours.poll(SECONDS) else f"nothing said in {SECONDS} s"
    except EOFError:
        said = "ended without a word"
    process.kill()
    process.join()
    assert not said, said


def _told(pipe: object, work: Callable[..., object], arguments: tuple[object, ...]) -> None:
    try:
        work(*arguments)
        pipe.send("")
    except BaseException:
        pipe.send(traceback.format_exc())


def _mount(source: bytes, target: Path, kind: bytes, flags: int, data: bytes = b"") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source, os.fsencode(target), kind, ctypes.c_ulong(flags), data):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def small_disk(folder: Path, nbytes: int) -> None:
    """Mount one of that size on ``folder``, for this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEWNS) and libc.unshare(_NEWUSER | _NEWNS):
        raise OSError(number := ctypes.get_errno(), os.strerror(number), "unshare")
    _mount(b"none", Path("/"), b"", _REC | _PRIVATE)
    _mount(b"tmpfs", folder, b"tmpfs", 0, b"size=%d" % nbytes)


@contextlib.contextmanager
def full(folder: Path, room: int) -> Iterator[None]:
    """Inside the ``with`` a small disk has so many bytes left."""
    ballast = folder / "ballast"
    free = os.statvfs(folder)
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_frsize - room, 1))
    try:
        yield
    finally:
        ballast.unlink()


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Inside the ``with`` nobody writes to a small disk."""
    _mount(b"none", folder, b"", _REMOUNT | _RDONLY)
    try:
        yield
    finally:
        _mount(b"none", folder, b"", _REMOUNT)


@contextlib.contextmanager
def file_limit(nbytes: int) -> Iterator[None]:
    """Inside the ``with`` no file becomes larger: EFBIG in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def memory_limit(nbytes: int) -> Iterator[None]:
    """Inside the ``with`` the process may take so many bytes of address space more than it has."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@functools.cache
def why_no_mounts() -> str:
    """Empty where a process may mount for itself."""
    try:
        in_process(_try_out)
    except AssertionError as error:
        return str(error).strip().rpartition("\n")[2]
    return ""


def _try_out() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        small_disk(Path(folder), 1 << 20)
        with read_only(Path(folder)):
            pass
        ctypes.CDLL(None).umount2(os.fsencode(folder), 2)
