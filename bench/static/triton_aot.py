"""Triton, ahead of time: a @triton.jit kernel -> PTX, cubin or hsaco. What a launch is specialised on (pointers on 16 bytes,
integers divisible by 16, constants) is asked of Triton's own binder, which needs no driver."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from bench.static.nvcc import ROOT
from peftk.ops.gpu import LEAST_TRITON

STORE = ROOT / "build" / "triton"
CUDA_TARGETS = (75, 80, 90, 100, 120)
HIP_TARGETS = ("gfx942", "gfx1100")


def compiled(kernel: Any, target: int | str, arguments: Sequence[Any], options: dict[str, Any]) -> Any:
    """The compiled kernel (``.asm``, ``.metadata``) for sm_<target>, or a gfx target, as ``kernel[grid](*arguments, **options)``
    would compile it. Triton keeps what it made in TRITON_CACHE_DIR, here STORE unless the user set one."""
    import triton
    from triton.compiler import ASTSource

    signature, constants, attributes, settings = specialisation(kernel, target, arguments, options)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    with triton.knobs.cache.scope():
        if "TRITON_CACHE_DIR" not in os.environ:
            triton.knobs.cache.dir = str(STORE)
        return triton.compile(source, target=gpu_target(target), options=settings)


def specialisation(kernel: Any, target: int | str, arguments: Sequence[Any], options: dict[str, Any]) -> tuple[dict, ...]:
    """A launch as the compiler sees it: types by parameter, constants and alignments by position, the backend's options."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(gpu_target(target))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, facts, rest = bind(*arguments, **options)
    settings, signature, constants, attributes = kernel._pack_args(backend, options, bound, facts, rest)
    return signature, constants, attributes, settings.__dict__


def gpu_target(target: int | str) -> Any:
    """80 is sm_80, "gfx942" is AMD's. Wavefronts of gfx9 have 64 lanes."""
    from triton.backends.compiler import GPUTarget

    if isinstance(target, str):
        return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    return GPUTarget("cuda", target, 32)


def why_not() -> str:
    """Why nothing can be compiled here; empty where it can."""
    if not importlib.util.find_spec("triton"):
        return "triton is not installed"
    found = version("triton")
    least = ".".join(map(str, LEAST_TRITON))
    return "" if tuple(map(int, found.split(".")[:2])) >= LEAST_TRITON else f"triton is {found}, the kernels need {least}"
