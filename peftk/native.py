"""The door to peftk._C, the torch-free module with the compiled kernels, and the reason where it is missing."""

from __future__ import annotations

import importlib
import os
import types
from functools import cache
from pathlib import Path

import torch

NATIVE_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as DType in csrc/format/dtype.h


@cache
def native() -> types.ModuleType | None:
    """peftk._C, with its threads and its instruction set chosen; None where it can't be loaded."""
    try:
        module = importlib.import_module("peftk._C")
    except ImportError:
        return None
    module.thread_runtime = module.find_thread_runtime(str(Path(torch.__file__).parent / "lib"))
    if forced := os.environ.get("PEFTK_CPU_ISA"):
        module.set_tier(forced)
    return module


@cache
def why_not_native() -> str:
    """Why ``native()`` is None; an empty string where it is there."""
    if native() is not None:
        return ""
    report = Path(__file__).with_name("_native_build.txt")
    if report.exists() and (text := report.read_text().strip()) != "built":
        return text
    try:
        importlib.import_module("peftk._C")
    except ImportError as error:
        return f"peftk._C can't be imported: {error}"
    return ""


def address(tensor: torch.Tensor | None) -> int:
    """Where the tensor's first element lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
