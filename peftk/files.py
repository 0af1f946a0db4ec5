"""Files that somebody else may have written: nothing in them is run, no more memory is taken than they hold, and one that can't
be read is a ValueError that names it. What is written is written by torch and safetensors, whose errors of the disk become an
OSError that names the file."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file says. ValueError for other text, for a key that comes twice in an object, and for nesting too deep."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error


def read_tensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file."""
    try:
        return load_file(path)
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a dtype that torch doesn't have
        raise ValueError(f"{path}: expected a safetensors file, got {type(error).__name__}: {error}") from error


def read_torch(path: str | os.PathLike) -> Any:
    """Tensors, numbers, texts and containers of them from a file of torch.save, on the CPU. ValueError for one that asks for
    anything else, since a pickle may name any function, and for one whose zip is compressed: torch writes none, and a small file
    may unfold to any size."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                raise ValueError("expected parts as they are, got compressed parts")
            if sum(part.file_size for part in parts) > path.stat().st_size:
                raise ValueError("expected parts of the file, got parts that are larger than the file")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged bytes raise whatever the readers stumble over
        told = str(error).partition("\n")[0] or "nothing more"
        raise ValueError(
            f"{path}: expected a file of torch.save with tensors and plain values, got {type(error).__name__}: {told}"
        ) from error


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file of these."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error


def write_torch(path: str | os.PathLike, value: Any) -> None:
    """torch.save's file of tensors, plain values and containers of them."""
    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except RuntimeError as error:  # of the archive that isn't whole, while the disk's is being handled
        if not isinstance(cause := error.__context__, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, os.fspath(path)) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"expected each key once, got {next(name for name in found if names.count(name) > 1)!r} twice")
    return found
