"""What processes send each other, counted: every collective that torch.distributed runs inside a ``with``, with its bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from peftk.planner.traffic import GATHER, REDUCE, SCATTER

# By the op that runs it: the collective, and which of the call's tensors are the whole.
KINDS = {
    "c10d::_allgather_base_": (GATHER, "first"),
    "c10d::_reduce_scatter_base_": (SCATTER, "last"),
    "c10d::allreduce_": (REDUCE, "every"),
    "_c10d_functional::all_gather_into_tensor": (GATHER, "result"),
    "_c10d_functional::reduce_scatter_tensor": (SCATTER, "first"),
    "_c10d_functional::all_reduce": (REDUCE, "first"),
}
NO_COLLECTIVE = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_")


class Collectives(TorchDispatchMode):
    """``bytes`` by kind: of the whole that is gathered or summed, as peftk.planner.traffic has them. DDP's own notes to
    itself, broadcast once after its first step, are left out; RuntimeError for a collective that KINDS doesn't know."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it comes back as collectives of plain tensors
        result = func(*args, **(kwargs or {}))
        name = getattr(getattr(func, "_schema", None), "name", "")
        if name.startswith(("c10d::", "_c10d_functional::")):
            self._enter(name, [t for t in tree_iter(args) if isinstance(t, torch.Tensor)], result)
        return result

    def _enter(self, name: str, tensors: list[torch.Tensor], result: Any) -> None:
        if name.split("::")[1] in NO_COLLECTIVE or (name == "c10d::broadcast_" and not any(map(_is_floating, tensors))):
            return
        if name not in KINDS:
            raise RuntimeError(f"{name}: a collective whose bytes aren't counted; KINDS has {', '.join(KINDS)}")
        kind, which = KINDS[name]
        whole = {"first": tensors[:1], "last": tensors[-1:], "every": tensors, "result": [result]}[which]
        self.bytes[kind] += sum(t.nbytes for t in whole)


def _is_floating(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point()
