"""Files and folders that appear whole or not at all: written beside their place, synced, then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def write_file(path: str | os.PathLike, content: bytes) -> None:
    """Replace ``path`` by ``content``; a reader sees the old bytes or the new ones. A link stays one. OSError names ``path``."""
    path = Path(path).resolve()
    temporary = _beside(path)
    with _named(path, temporary):
        file = open(temporary, "xb")
        try:
            with file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextlib.contextmanager
def _named(path: Path, temporary: Path) -> Iterator[None]:
    """Inside the ``with`` the system's errors name ``path`` where they named nothing, or what was to become it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None and not str(error.filename).startswith(str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path) + str(error.filename or "").removeprefix(str(temporary))) from error


@contextlib.contextmanager
def write_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place when the ``with`` ends without an error.

    An existing folder is replaced whole, in one step where the system can, so that a reader finds the old one or the new one at
    any time. With an error nothing changes, and the system's errors name ``path``. NotADirectoryError where ``path`` is a file;
    OSError where the folder can't be renamed (a mount point), which then says where the finished files lie.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path}: expected a folder or nothing, got a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    with _named(path, temporary):
        temporary.mkdir()
        try:
            yield temporary
            _sync_all(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # what went wrong is the error, not what can't be removed
            raise
    _publish(temporary, path)


def publish(folder: Path, path: Path) -> None:
    """Let a finished folder, on the same file system, take the place ``path``, as ``write_folder`` does."""
    _sync_all(folder)
    _publish(folder, path)


def _publish(temporary: Path, path: Path) -> None:
    try:
        _take_place(temporary, path)
    except OSError as error:
        raise OSError(f"{path}: can't be replaced ({error}); the finished files lie in {temporary}") from error
    sync(path.parent)


def _sync_all(folder: Path) -> None:
    for file in folder.rglob("*"):
        if not file.is_symlink():
            sync(file)
    sync(folder)


def carry_over(old: str | os.PathLike, new: Path, without: Collection[str]) -> None:
    """Link what ``old`` (if it exists) holds into ``new``, but for the names in ``without``; copies where links can't be made."""
    old = Path(old)
    for entry in old.iterdir() if old.is_dir() else ():
        if entry.name in without:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, new / entry.name)


def _link(source: str | os.PathLike, target: str | os.PathLike) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def remove_unfinished(path: str | os.PathLike) -> None:
    """What a killed process left beside ``path``; nobody else may be writing there."""
    path = Path(path).resolve()
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    for left in path.parent.iterdir():
        if name.fullmatch(left.name):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _take_place(temporary: Path, path: Path) -> None:
    """Rename; with an existing folder exchange the two, so that no moment has neither."""
    if not path.exists():
        os.rename(temporary, path)
    elif _exchange(temporary, path):
        shutil.rmtree(temporary)
    else:
        old = _beside(path)
        os.rename(path, old)
        try:
            os.rename(temporary, path)
        except BaseException:
            os.rename(old, path)
            raise
        shutil.rmtree(old)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths atomically; False where the system can't."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    return rename is not None and rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def sync(path: Path) -> None:
    """Let the disk have a file, or a folder's names."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
