"""The pager: hands out tensors, makes them resident for a while, fetches the next ones meanwhile."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator, Sequence

import torch

from peftk.paging.engine import Stats, Store

_pagers: weakref.WeakSet[Pager] = weakref.WeakSet()
_default_pagers: dict[tuple[torch.device, int | None], Pager] = {}


class Pager:
    """Allocates tensors whose memory may be paged out between two uses.

    ``device``: where the tensors are used, "cpu" or a CUDA device. ``budget``: bytes that may be resident at once; None leaves
    it to the system, which pages under memory pressure. ``folder``: of the page file, TMPDIR if None (CPU only);
    ``allow_tmpfs``: take a folder that lies in memory all the same. ``store``: one made by the caller, instead of the device's.

    OSError, which says what folder and why, where no page file can be made there; RuntimeError where the device's driver can't
    be used; ValueError for a bad argument.
    """

    def __init__(
        self,
        device: torch.device | str,
        budget: int | None = None,
        folder: str | os.PathLike | None = None,
        *,
        allow_tmpfs: bool = False,
        store: Store | None = None,
    ) -> None:
        if budget is not None and (not isinstance(budget, int) or budget <= 0):
            raise ValueError(f"budget={budget!r}: expected a positive number of bytes, or None")
        try:
            self.device, self.budget = torch.device(device), budget
        except RuntimeError as error:
            raise ValueError(f"device={device!r}: expected cpu or a CUDA device") from error
        self._store = store or _store_for(self.device, budget, folder, allow_tmpfs)
        self._lock = threading.RLock()
        self._process, self._closed = os.getpid(), False
        self._close_store = weakref.finalize(self, self._store.close)
        _pagers.add(self)

    def empty(self, shape: Sequence[int] | int, dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of zeros on the pager's device. Its memory is given back after it died (and with it those cut from
        the same piece of memory), also if the pager is gone by then.

        OSError where the disk, MemoryError where the host has no room for it: room is reserved here, so that a later write
        doesn't fail for it.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if any(size < 0 for size in shape):
            raise ValueError(f"shape: expected sizes from 0 on, got {shape}")
        with self._usable():
            return self._store.empty(shape, dtype) if 0 not in shape else torch.zeros(shape, dtype=dtype, device=self.device)

    def check_room(self, nbytes: int) -> None:
        """OSError where the disk has no room for tensors of so many bytes in all. Nothing is reserved; where the store is memory,
        nothing is known before ``empty``."""
        with self._usable():
            self._store.check_room(nbytes)

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the budget lets all of them be resident at once, on whole chunks as they lie. ValueError as ``resident``."""
        with self._usable():
            return self._store.fits(tensors)

    @contextlib.contextmanager
    def resident(self, tensors: Sequence[torch.Tensor], upcoming: Sequence[torch.Tensor] = ()) -> Iterator[list[torch.Tensor]]:
        """Inside the ``with`` these tensors are resident; those ``upcoming`` are fetched while the body runs, in that order, as
        far as the budget goes.

        Contiguous slices of the pager's tensors do as well: a tensor larger than the budget is worked through in slices. Yields
        the tensors to work on, in the same order: the same ones, but staged copies where a GPU has no concurrent managed
        access. ValueError for a tensor that is not this pager's, or where all of them don't fit the budget at once; OSError
        where a page could not be written or read.
        """
        with self._usable():
            mark, here = self._store.enter(tensors, upcoming)
        try:
            yield here
        finally:
            with self._lock:
                self._store.leave(mark)

    def stats(self) -> Stats:
        """Of this pager."""
        with self._lock:
            return self._store.stats()

    def close(self) -> None:
        """Stop paging. Tensors that still live keep their memory and values; the page file goes with the last of them."""
        with self._lock:
            self._closed = True
            self._close_store()

    def __contains__(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lies in this pager's memory."""
        with self._lock:
            return self._store.holds(tensor)

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        """Under the lock. RuntimeError where the pager is closed, or another process's."""
        if os.getpid() != self._process:
            raise RuntimeError(f"this pager belongs to process {self._process}, not to {os.getpid()}: make one in this process")
        with self._lock:
            if self._closed:
                raise RuntimeError("this pager is closed: make a new one")
            yield


def _store_for(device: torch.device, budget: int | None, folder: str | os.PathLike | None, allow_tmpfs: bool) -> Store:
    if device.type == "cpu":
        from peftk.paging.chunked import ChunkedStore
        from peftk.paging.mapped import MappedFile

        return ChunkedStore(MappedFile(budget, folder, allow_tmpfs), budget)
    if device.type == "cuda":
        from peftk.paging.unified import store_on

        return store_on(device, budget)
    raise ValueError(f"device={str(device)!r}: expected cpu or a CUDA device")


def empty(shape: Sequence[int] | int, dtype: torch.dtype, device: torch.device | str, budget: int | None = None) -> torch.Tensor:
    """A tensor of zeros from the default pager of this device and budget (bytes, for all tensors made with it together)."""
    key = (torch.device(device), budget)
    if (pager := _default_pagers.get(key)) is None or pager._process != os.getpid():
        pager = _default_pagers[key] = Pager(device, budget)
    return pager.empty(shape, dtype)


def resident(
    tensors: Sequence[torch.Tensor], upcoming: Sequence[torch.Tensor] = ()
) -> contextlib.AbstractContextManager[list[torch.Tensor]]:
    """``Pager.resident`` of the pager that made the first tensor. ValueError where none did."""
    for pager in list(_pagers):
        if tensors and tensors[0] in pager:
            return pager.resident(tensors, upcoming)
    got = f"one of shape {tuple(tensors[0].shape)} that none made" if tensors else "none"
    raise ValueError(f"tensors: expected at least one tensor, made by peftk.paging.empty or a Pager, got {got}")


def stats() -> Stats:
    """Of all living pagers of this process, added up."""
    return sum((pager.stats() for pager in list(_pagers)), Stats())
