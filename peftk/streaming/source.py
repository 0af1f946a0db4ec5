"""The tensors of a checkpoint by name, in the order of the files that hold them; each is read in pieces."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from peftk.streaming.safetensors_file import NAMES, read_header

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_WEIGHTS, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_ENDS = 1 << 20  # bytes at either end of a file that tell whether it is the same one


class Tensor(Protocol):
    """A stored tensor: the format's name of its dtype, its shape, its bytes in ranges as uint8."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def read(self, start: int, stop: int) -> torch.Tensor: ...


class Made:
    """A tensor that a function makes when it is read, of a file that must be decoded; kept from the first range to the last."""

    def __init__(self, dtype: torch.dtype, shape: Sequence[int], make: Callable[[], torch.Tensor]):
        self.dtype, self.shape, self._make = NAMES[dtype], tuple(shape), make
        self.nbytes = dtype.itemsize * math.prod(self.shape)
        self._bytes: torch.Tensor | None = None

    def read(self, start: int, stop: int) -> torch.Tensor:
        if self._bytes is None:
            self._bytes = self._make().contiguous().view(-1).view(torch.uint8)
        part = self._bytes[start:stop].clone()
        if stop == self.nbytes:
            self._bytes = None
        return part


@dataclass(frozen=True)
class Source:
    """A checkpoint: ``groups`` holds the tensors of each file in turn; ``files`` are what it was read from."""

    groups: tuple[Mapping[str, Tensor], ...]
    files: tuple[Path, ...]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for group in self.groups for name, tensor in group.items()}


def fingerprint(files: Sequence[Path]) -> list[dict[str, Any]]:
    """What tells these files from changed ones: sizes, times, and the bytes at either end."""
    return [_print_of(path) for path in files]


def _print_of(path: Path) -> dict[str, Any]:
    facts = path.stat()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(_ENDS))
        file.seek(max(0, facts.st_size - _ENDS))
        digest.update(file.read(_ENDS))
    return {"name": path.name, "size": facts.st_size, "mtime_ns": facts.st_mtime_ns, "ends": digest.hexdigest()}


def open_folder(folder: Path) -> Source:
    """The checkpoint in a folder: the files that its index names, or its one file of weights. ValueError for a folder without
    weights and for files that don't fit their index."""
    for index, read in ((INDEX, _safetensors_group), (TORCH_INDEX, _torch_group)):
        if (folder / index).is_file():
            return _from_index(folder, folder / index, read)
    single = folder / WEIGHTS
    found = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if found:
        return _checked(Source(tuple(map(_safetensors_group, found)), tuple(found)), folder)
    if (folder / TORCH_WEIGHTS).is_file():
        return Source((_torch_group(folder / TORCH_WEIGHTS),), (folder / TORCH_WEIGHTS,))
    raise ValueError(f"{folder}: expected {WEIGHTS}, {INDEX} or {TORCH_WEIGHTS}, got {', '.join(sorted(os.listdir(folder)))}")


def _from_index(folder: Path, index: Path, read: Callable[[Path], dict[str, Tensor]]) -> Source:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: expected JSON with a weight_map, got {error!r}") from error
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{index}: names {absent[0]}, which is not in the folder")
    groups = [read(folder / name) for name in names]
    source = _checked(Source(tuple(groups), tuple(folder / name for name in names)), folder)
    if absent := sorted(set(places) - set(source.tensors)):
        raise ValueError(f"{index}: names the tensor {absent[0]}, which {places[absent[0]]} doesn't have")
    return source


def _checked(source: Source, folder: Path) -> Source:
    if len(source.tensors) != sum(map(len, source.groups)):
        names = [name for group in source.groups for name in group]
        raise ValueError(f"{folder}: the tensor {max(names, key=names.count)} is in more than one file")
    return source


def file_group(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, safetensors or, by its ending, torch.save's. ValueError names it."""
    return _torch_group(path) if path.suffix == ".bin" else _safetensors_group(path)


def _safetensors_group(path: Path) -> dict[str, Tensor]:
    return dict(read_header(path)[0])


def _torch_group(path: Path) -> dict[str, Tensor]:
    """A file of torch.save, mapped; tensors only are unpickled. Mapped pages stay until the file is closed."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if odd := [name for name, value in tensors.items() if value.dtype not in NAMES]:
        raise ValueError(f"{path}: {odd[0]}: expected a dtype of {', '.join(map(str, NAMES))}, got {tensors[odd[0]].dtype}")
    return from_tensors(tensors)


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, Tensor]:
    """A group of tensors that are in memory, or in a mapped file."""
    return {name: Made(t.dtype, t.shape, t.detach) for name, t in tensors.items()}
