"""Files and folders that appear whole or not at all: written beside their place, synced, then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def write_file(path: str | os.PathLike, content: bytes) -> None:
    """Replace ``path`` by ``content``; a reader sees the old bytes or the new ones."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def write_folder(path: str | os.PathLike, marker: str) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place when the ``with`` ends without an error.

    An existing folder is replaced whole, but only one that holds ``marker`` (a file that this kind of folder always has) or
    nothing: FileExistsError otherwise, before anything is written.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / marker).exists())):
        raise FileExistsError(f"{path}: expected a new folder or one with {marker}, got something else; it is left alone")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        temporary.chmod(0o777 & ~_umask())
        _take_place(temporary, path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
    _sync(path.parent)


def _take_place(temporary: Path, path: Path) -> None:
    """Rename; with an existing folder exchange the two in one step, so that no moment has neither."""
    if not path.exists():
        os.rename(temporary, path)
        return
    if not _exchange(temporary, path):
        old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
        os.rename(path, old / path.name)
        os.rename(temporary, path)
        shutil.rmtree(old)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths atomically; False where the system can't."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    return rename is not None and rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
