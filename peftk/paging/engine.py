"""What a pager asks of an engine, and which engine serves a device."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from peftk.paging.window import Chunk


@dataclass(frozen=True)
class Memory:
    """A piece of pageable memory, zeroed."""

    address: int
    nbytes: int  # rounded up to the engine's granule
    tensor: torch.Tensor  # uint8 (nbytes,)
    owner: Any  # dies with the last tensor over this memory


class Engine(Protocol):
    """Moves chunks. The pager keeps the account and calls it from one thread at a time."""

    granule: int  # bytes; addresses and sizes of chunks are multiples of it

    def allocate(self, nbytes: int) -> Memory:
        """Zeroed memory whose place on the backing store is reserved."""

    def move(self, out: Sequence[Chunk], into: Sequence[Chunk]) -> Any:
        """Start to page out ``out``, after their last use, then to bring in ``into``. A handle for ``wait``."""

    def wait(self, handles: Iterable[Any]) -> None:
        """Until these moves are done (on a GPU: the current stream waits, not the host). Raises what went wrong in them."""

    def used(self, chunks: Sequence[Chunk]) -> None:
        """The work that uses them has been issued: mark it, so that they leave after it."""

    def close(self) -> None:
        """No more moves. Memory goes when its tensors do."""


def engine_for(device: torch.device, folder: str | os.PathLike | None, allow_tmpfs: bool) -> Engine:
    """ValueError for a device without a pager."""
    if device.type == "cpu":
        from peftk.paging.mapped import MappedFile

        return MappedFile(folder, allow_tmpfs)
    raise ValueError(f"device={str(device)!r}: expected cpu or a CUDA device")
