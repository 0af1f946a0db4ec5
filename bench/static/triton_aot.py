"""Triton, ahead of time: a @triton.jit kernel -> PTX, cubin or hsaco, specialised as Triton's launcher would specialise it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

CUDA_TARGETS = (75, 80, 90, 100, 120)
HIP_TARGETS = ("gfx942", "gfx1100")
_DTYPE = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", torch.uint8: "u8",
    torch.int8: "i8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def compiled(kernel: Any, target: int | str, arguments: Sequence[Any], options: dict[str, Any]) -> Any:
    """The compiled kernel (``.asm``, ``.metadata``) for sm_<target>, or a gfx target, as ``kernel[grid](*arguments, **options)``
    would compile it: pointers on 16 bytes and integers divisible by 16 are known to be, an integer 1 and None are constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature: dict[str, str] = {}
    constants = {name: value for name, value in options.items() if name in names}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, (name, value) in enumerate(zip(names, arguments, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
            continue
        signature[name] = argument_type(value)
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if isinstance(number, int) and number % 16 == 0:
            attributes[(position,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    gpu = GPUTarget("hip", target, 64 if str(target).startswith("gfx9") else 32) if isinstance(target, str) else None
    settings = {name: value for name, value in options.items() if name not in names}
    return triton.compile(source, target=gpu or GPUTarget("cuda", target, 32), options=settings)


def argument_type(value: Any) -> str:
    """Triton's name for an argument's type."""
    if isinstance(value, torch.Tensor):
        return "*" + _DTYPE[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def why_not() -> str:
    """Why nothing can be compiled here; empty where it can."""
    import importlib.util

    return "" if importlib.util.find_spec("triton") else "triton is not installed"
