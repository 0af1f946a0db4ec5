"""What the paged store asks of an engine, what the pager asks of a store, and what both report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from peftk.paging.window import Chunk


@dataclass(frozen=True)
class Stats:
    """What lies where now, and counts since the pager was made. Bytes are of whole chunks."""

    resident: int = 0  # bytes in memory, for a GPU in its own
    paged_out: int = 0  # bytes in the page file only, for a GPU on the host
    faults: int = 0  # chunks that had been paged out, were needed, and had not been announced: somebody waited for them
    prefetched: int = 0  # chunks that had been paged out, were needed, and had been fetched ahead
    bytes_in: int = 0  # read from the page file, or moved to the GPU
    bytes_out: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the chunks brought back that had been announced; 1.0 where none had to be."""
        brought = self.prefetched + self.faults
        return self.prefetched / brought if brought else 1.0

    def __add__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Memory:
    """Zeroed pageable memory."""

    address: int
    place: int  # where it begins on the backing store
    owner: Any  # keeps the memory; every tensor over it holds this object


class Engine(Protocol):
    """Moves chunks. The store keeps the account and makes one call at a time."""

    chunk_bytes: int

    def allocate(self, nbytes: int) -> Memory:
        """``nbytes``: a multiple of chunk_bytes. Room on the backing store is reserved. OSError or MemoryError."""

    def check_room(self, nbytes: int) -> None:
        """OSError where the backing store is known to have less room."""

    def tensor(self, owner: Any, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor, with a storage of its own, over memory that ``owner`` keeps."""

    def move(self, out: Sequence[Chunk], into: Sequence[Chunk]) -> None:
        """Start to page out ``out``, each after the work that used it last, and to bring in ``into``: an incoming chunk beyond
        len(into) - len(out) starts after a chunk has left. len(out) <= len(into)."""

    def wait(self, chunks: Sequence[Chunk]) -> None:
        """Until these have arrived; on a GPU the current stream waits, not the host. Raises what went wrong in a move."""

    def used(self, chunks: Sequence[Chunk]) -> None:
        """The work that uses them has been issued: mark it, so that they leave after it."""

    def close(self) -> None:
        """No more moves. Memory goes when its tensors do."""


class Store(Protocol):
    """Where a pager's tensors lie. Calls come one at a time."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor: ...

    def enter(self, tensors: Sequence[torch.Tensor], upcoming: Sequence[torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
        """Make ``tensors`` resident, start to fetch ``upcoming``; a mark for ``leave``, and the tensors to work on."""

    def leave(self, mark: Any) -> None: ...

    def check_room(self, nbytes: int) -> None: ...

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool: ...

    def holds(self, tensor: torch.Tensor) -> bool: ...

    def stats(self) -> Stats: ...

    def close(self) -> None: ...


def check_tensor(tensor: torch.Tensor, is_ours: bool, argument: str) -> None:
    """ValueError where a pager can't make it resident."""
    if not is_ours:
        raise ValueError(f"{argument}, shape {tuple(tensor.shape)}: expected a tensor made by this pager's empty()")
    if not tensor.is_contiguous():
        raise ValueError(f"{argument}: expected a contiguous tensor, got strides {tensor.stride()}")
