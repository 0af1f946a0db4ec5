"""The safetensors format in pieces: 8 bytes of length, a JSON header, the tensors' bytes without gaps.

Files are read by plain reads into a buffer: pages of a mapped file would count as this process's memory for as long as they stay.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# By the format's names; the sizes of those that torch doesn't have stand in the file.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes; the reference implementation refuses longer ones
_ALIGNED = 8  # bytes, to which the header is filled up with spaces
_PIECE = 8 << 20  # bytes that are hashed or copied at a time


@dataclass(frozen=True)
class Span:
    """A tensor's place in a file."""

    path: Path
    dtype: str  # the format's name
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    nbytes: int

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Its bytes from ``start`` to ``stop``, uint8. ValueError where the file ends before."""
        buffer = torch.empty(stop - start, dtype=torch.uint8)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            _fill(handle, memoryview(buffer.numpy()), self.start + start, self.path)
        finally:
            os.close(handle)
        return buffer


def _fill(handle: int, view: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(handle, [view[done:]], offset + done)
        if count == 0:
            raise ValueError(f"{path}: expected at least {offset + len(view)} bytes, got {offset + done}")
        done += count


def read_header(path: Path) -> tuple[dict[str, Span], dict[str, str]]:
    """(tensors by name in the order of their bytes, the file's metadata). ValueError names the file and what doesn't fit."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_LARGEST_HEADER, size - 8):
            raise ValueError(f"{path}: expected a safetensors file, got {size} bytes with a header of {length}")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        spans = {name: _span(path, entry, 8 + length, size) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from error
    return dict(sorted(spans.items(), key=lambda item: item[1].start)), metadata


def _span(path: Path, entry: dict[str, Any], begin: int, size: int) -> Span:
    start, stop = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if not 0 <= start <= stop <= size - begin:
        raise ValueError(f"bytes {start} to {stop} in a file of {size}")
    if dtype in DTYPES and stop - start != DTYPES[dtype].itemsize * torch.Size(shape).numel():
        raise ValueError(f"{stop - start} bytes for {dtype} of shape {shape}")
    return Span(path, dtype, shape, begin + start, stop - start)


@dataclass(frozen=True)
class Entry:
    """A tensor to be written. ``late``: ``shape`` is the largest one it may turn out to have, and its bytes come at once, at the
    end of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    late: bool = False

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, late: bool = False) -> Entry:
        """For a tensor such as this one, which may lie on the meta device."""
        return cls(name, NAMES[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size(), late)


class Writer:
    """A file whose tensors come in any order and in pieces; its bytes depend on the entries and the tensors alone."""

    def __init__(self, path: Path, entries: Sequence[Entry]):
        early = [entry for entry in entries if not entry.late]
        early.sort(key=lambda entry: -DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else 0)  # so that all are aligned
        self._late: dict[str, bytes] = {}
        self._late_names = [entry.name for entry in entries if entry.late]
        self._places: dict[str, tuple[Entry, int]] = {}
        position = 0
        for entry in early:
            self._places[entry.name] = entry, position
            position += entry.nbytes
        self._end = position
        widest = {entry.name: bytes(entry.nbytes) for entry in entries if entry.late}
        length = len(self._header(widest))
        self._begin = 8 + length + -length % _ALIGNED
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        try:
            self._reserve(self._begin + sum(entry.nbytes for entry in entries))
        except BaseException:
            os.close(self._handle)
            raise

    def _reserve(self, size: int) -> None:
        """Take the space now: a full disk shows before the work, not after it."""
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._handle, 0, size)

    def put(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """Write a tensor's bytes ``start`` bytes into the entry; of a late entry all of them."""
        data = memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
        if name in self._late_names:
            self._late[name] = bytes(data)
            return
        entry, place = self._places[name]
        if start + len(data) > entry.nbytes:
            raise ValueError(f"{name}: expected {entry.nbytes} bytes, got {start + len(data)}")
        _write(self._handle, data, self._begin + place + start)

    def get(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Bytes of an entry as the file has them now, uint8."""
        buffer = torch.empty(stop - start, dtype=torch.uint8)
        _fill(self._handle, memoryview(buffer.numpy()), self._begin + self._places[name][1] + start, Path(name))
        return buffer

    def finish(self) -> None:
        """Write late entries and the header, and let the disk have all of it."""
        _write(self._handle, b"".join(self._late[name] for name in self._late_names), self._begin + self._end)
        header = self._header(self._late).ljust(self._begin - 8)
        _write(self._handle, len(header).to_bytes(8, "little") + header, 0)
        os.ftruncate(self._handle, self._begin + self._end + sum(map(len, self._late.values())))
        os.fsync(self._handle)

    def close(self) -> None:
        os.close(self._handle)

    def _header(self, late: dict[str, bytes]) -> bytes:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, (entry, place) in self._places.items():
            header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [place, place + entry.nbytes]}
        position = self._end
        for name in self._late_names:
            size = len(late[name])
            header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}
            position += size
        return json.dumps(header, separators=(",", ":")).encode()


def _write(handle: int, data: bytes | memoryview, offset: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(handle, view[done:], offset + done)


def sha256_of(path: Path) -> str:
    """Of a whole file."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
