"""The books of a step that runs on the meta device: which tensor's memory begins and ends when, and what it is for.

Every tensor that an op makes is entered with its storage's bytes, and struck out when the storage dies: what is alive at any
moment is what the same step holds on a real device, to the byte (tests/planner/test_ledger.py runs both). What a kernel takes
and gives back within one op is not seen, but for those in INSIDE.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_aten = torch.ops.aten

# Kernels that hold a copy of their first argument while they run: found by setting the kernel's high-water mark back before every
# op of a step on a CPU (SmolLM2, bf16). All others stayed below 5 MB.
INSIDE = frozenset({_aten.logsumexp.default})


@dataclass
class Entry:
    """One piece of memory. ``kind`` may be corrected until the books are closed."""

    nbytes: int
    kind: str
    phase: str
    begin: int  # on the ledger's clock
    end: int | None = None  # None: alive to the end


@dataclass(frozen=True)
class Moment:
    """The fullest moment of a phase: bytes alive by kind, and in how many pieces."""

    phase: str
    parts: dict[str, int]
    pieces: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Ledger(TorchDispatchMode):
    """In force inside a ``with``. ``kind`` and ``phase`` are those of what is made from now on; tensors whose last extent is
    ``vocabulary`` are logits.

    Values of meta tensors can't be asked for; a step that asks gets the answer for a batch without padding, in which a loss is
    taken on every token: a condition holds everywhere, a number is 0.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.kind, self.phase = vocabulary, "activations", "forward"
        self.entries: list[Entry] = []
        self._alive: dict[int, Entry] = {}
        self._clock = 0

    def own(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """Enter tensors that are there already; those that are entered are of this kind from now on."""
        for tensor in tensors:
            if (entry := self._alive.get(_key(tensor))) is not None:
                entry.kind = kind
            else:
                self._enter(tensor, kind)

    def is_new(self, tensor: torch.Tensor) -> bool:
        """Whether its memory has not been entered."""
        return _key(tensor) not in self._alive

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """What is made inside the ``with`` is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is _aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 0
        if func is _aten.index.Tensor and args[0].is_meta:
            args = (args[0], [_all_of(index) for index in args[1]])
        inside = torch.empty_like(args[0]) if func in INSIDE else None
        if inside is not None:
            self._enter(inside, self._kind_of(inside))
        result = func(*args, **(kwargs or {}))
        del inside
        for made in tree_iter(result):
            if isinstance(made, torch.Tensor) and made.layout is torch.strided and self.is_new(made):
                self._enter(made, self._kind_of(made))
        return result

    def _kind_of(self, made: torch.Tensor) -> str:
        if made.dim() < 2 or made.shape[-1] != self.vocabulary:
            return self.kind
        if self.phase == "forward":
            self.phase = "loss"
        return "logits"

    def _enter(self, tensor: torch.Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        entry = Entry(storage.nbytes(), kind, self.phase, self._clock)
        self._clock += 1
        self._alive[storage._cdata] = entry
        self.entries.append(entry)
        weakref.finalize(storage, self._strike_out, storage._cdata)

    def _strike_out(self, key: int) -> None:
        self._alive.pop(key).end = self._clock
        self._clock += 1

    def moments(self) -> list[Moment]:
        """The fullest of each phase, the phases in their order."""
        events = sorted(
            [(e.begin, e.nbytes, e) for e in self.entries] + [(e.end, -e.nbytes, e) for e in self.entries if e.end is not None],
            key=lambda event: event[0],
        )
        fullest: dict[str, tuple[int, int, Counter]] = {}
        alive: Counter = Counter()
        total = pieces = 0
        for _, nbytes, entry in events:
            total += nbytes
            pieces += 1 if nbytes > 0 else -1 if nbytes < 0 else 0
            alive[entry.kind] += nbytes
            if nbytes > 0 and total > fullest.get(entry.phase, (-1,))[0]:
                fullest[entry.phase] = total, pieces, Counter(alive)
        return [Moment(phase, {kind: n for kind, n in parts.items() if n}, count) for phase, (_, count, parts) in fullest.items()]


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _all_of(index: torch.Tensor | None) -> torch.Tensor | None:
    """A mask that holds everywhere, as the indices that it stands for."""
    if index is None or index.dtype != torch.bool:
        return index
    if index.dim() != 1:
        raise NotImplementedError(f"a mask of {index.dim()} dimensions picks values of a meta tensor")
    return torch.empty(index.shape, dtype=torch.int64, device="meta")


GROUPED_SINCE = (2, 9)  # torch: before it, attention's backward pass on the meta device gives keys the queries' heads


class FusedAttention(TorchFunctionMode):
    """Attention on the meta device as CPUs and GPUs run it: without its matrix of scores, which torch would write out there.
    Kept for the backward pass: the output, and a number for each head and query in fp32. ``dropout``: whether the device's
    kernel has it (a CPU's doesn't, and writes the scores out)."""

    def __init__(self, dropout: bool) -> None:
        super().__init__()
        self.dropout = dropout

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention or not args[0].is_meta:
            return func(*args, **kwargs)
        return self._attend(*args, **kwargs)

    def _attend(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if dropout_p and not self.dropout:
            with torch._C.DisableTorchFunction():
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
                )
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask.logical_not(), float("-inf"))
        if k.shape[1] != q.shape[1] and torch.__version__ < GROUPED_SINCE:
            raise NotImplementedError(
                f"{k.shape[1]} key heads for {q.shape[1]} query heads: expected torch 2.9 or newer, which knows their gradients' "
                f"shapes without memory, got {torch.__version__}"
            )
        kernel = _aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
