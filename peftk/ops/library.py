"""Registration of ops with torch.library: ``torch.ops.peftk.<op>`` with a CPU and CUDA kernel, a fake one, and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("peftk", "FRAGMENT")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any], autograd: Callable[..., Any] | None = None) -> None:
    """Define ``peftk::<schema>``. ``run`` chooses an implementation and computes; ``fake`` makes tensors of the right shape and
    dtype; ``autograd``, if given, is called with the same arguments whenever a gradient may be wanted (an autograd.Function's
    ``apply`` is the cheapest way: 25 us a forward and backward less than register_autograd)."""
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"peftk::{name}", fake, lib=_LIBRARY)
    if autograd is not None:
        _LIBRARY.impl(name, autograd, "Autograd")
