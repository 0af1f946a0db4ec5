"""Registration of ops with torch.library: ``torch.ops.peftk.<op>`` with a CPU and CUDA kernel, a fake one, and autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from peftk.ops import dispatch

_LIBRARY = torch.library.Library("peftk", "FRAGMENT")
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any], autograd: Callable[..., Any] | None = None) -> None:
    """Define ``peftk::<schema>``. ``run`` chooses an implementation and computes; ``fake`` makes tensors of the right shape and
    dtype; ``autograd``, if given, is called with the same arguments whenever a gradient may be wanted (an autograd.Function's
    ``apply`` is the cheapest way: 25 us a forward and backward less than register_autograd)."""
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    _LIBRARY.impl(name, _without_autocast(name), "AutocastCPU")
    _LIBRARY.impl(name, _without_autocast(name), "AutocastCUDA")
    torch.library.register_fake(f"peftk::{name}", _answering(run, fake), lib=_LIBRARY)
    if autograd is not None:
        _LIBRARY.impl(name, autograd, "Autograd")


def _answering(run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake kernel; inside ``dispatch.asking`` it has ``run`` choose first."""

    def made(*arguments: Any) -> Any:
        if dispatch.is_asking():
            with contextlib.suppress(dispatch.Answered):
                run(*arguments)
        return fake(*arguments)

    return made


def _without_autocast(name: str) -> Callable[..., Any]:
    """Autocast stops at the door: the op has chosen its dtypes, and products inside it must not be cast again."""

    def run(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return getattr(torch.ops.peftk, name)(*arguments)

    return run
