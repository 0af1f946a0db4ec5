"""When 4-bit layers round their activations to 8 bits: a layer's own attribute, and a context manager that overrules it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_override: ContextVar[bool | None] = ContextVar("peftk_int8_activations", default=None)


_lock = threading.Lock()
_open = 0  # contexts, in any thread: torch.compile can't read a ContextVar, but guards on a global (2.6: on no class's attribute)


@contextlib.contextmanager
def use_int8_activations(enabled: bool = True) -> Iterator[None]:
    """Inside the ``with`` every NF4Linear, with or without adapters, rounds its input to 8 bits (``peftk.ops.nf4_linear_int8``:
    0.8 to 2 % of y's norm in error, up to twice the speed), or with False none does, whatever its attribute
    ``int8_activations`` says.

    For inference only: a layer in training mode, and a call where a gradient is wanted, always take the exact path. Holds for
    the current thread or task. Under torch.compile a layer that meets this context breaks the graph (and fails with
    fullgraph=True): set the layers' attribute instead, which compiles.
    """
    global _open
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected a bool, got {enabled!r}")
    token = _override.set(enabled)
    with _lock:
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
        _override.reset(token)


def wants_int8(layer: torch.nn.Module, *tensors: torch.Tensor | None) -> bool:
    """Whether ``layer`` rounds its activations in this call, whose result depends on ``tensors``."""
    # The mode matters too: reentrant gradient checkpointing runs a training step's forward pass without gradients.
    if layer.training or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return False
    override = _override.get() if _open > 0 else None
    return layer.int8_activations if override is None else override
