"""peftk in the place of bitsandbytes' CPU kernels, without a change to code that uses bitsandbytes.

``import bitsandbytes`` calls ``enable()`` by itself where peftk is installed (entry/), unless PEFTK_BITSANDBYTES=0. Then on a
CPU, for NF4 and FP4, nested or not, of any shape, block size and ``quant_storage``:

- its ops (kernels.py): quantize_4bit, dequantize_4bit, gemm_4bit, gemv_4bit, quantize_blockwise, dequantize_blockwise, and
  Adam's and AdamW's update in 32 and 8 bits (optimizers.py); the other optimizers stay bitsandbytes';
- ``matmul_4bit`` (products.py), since the backward pass of Linear4bit is no op;
- ``_convert_weight_packed_for_cpu``, which rewrote a weight and its constants at the first forward pass in eval mode.

On a GPU ``enable(cuda=True)``, or PEFTK_BITSANDBYTES=cuda, takes over quantize_4bit and dequantize_4bit (on_cuda.py).

Parameters are read where they lie (weights.py). Everything else on another device goes where it went before. NaN or Inf in a
weight make their block's absmax NaN or Inf, and with nested statistics all of the weight, as in bitsandbytes; a block of zeros
stays zeros.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from peftk.native import native, why_not_native
from peftk.replaced import Replacements, held

if TYPE_CHECKING:
    from types import ModuleType

PACKAGE = "bitsandbytes"
FIRST, BEFORE = (0, 46), (0, 51)  # the versions that were tried


def enable(cuda: bool = False) -> None:
    """Take over. RuntimeError says why not: another version, or no compiled kernels. Done twice is done once. ``cuda``: GPU
    kernels too; where they can't run, bitsandbytes' stay, and ``peftk.info().left`` says why."""
    import bitsandbytes

    if held(PACKAGE) is not None:
        return
    if reason := reason_against(installed_version(bitsandbytes)):
        raise RuntimeError(reason)
    replacements = Replacements(PACKAGE)
    try:
        _replace(replacements, bitsandbytes, cuda)
    except BaseException:
        replacements.put_back()
        raise
    replacements.hold()


def disable() -> None:
    """Put back every function and kernel that was replaced."""
    if (replacements := held(PACKAGE)) is not None:
        replacements.put_back()


def is_enabled() -> bool:
    return held(PACKAGE) is not None


def installed_version(module: ModuleType) -> str:
    """Of the package's metadata: its ``__version__`` is not there yet when it calls its backends."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return getattr(module, "__version__", "of unknown version")


def reason_against(version: str) -> str:
    """Why bitsandbytes of this version is left alone; an empty string where it isn't."""
    if native() is None:
        return why_not_native()
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not FIRST <= tuple(map(int, found.groups())) < BEFORE:
        first, before = (".".join(map(str, v)) for v in (FIRST, BEFORE))
        return f"bitsandbytes: expected >= {first} and < {before}, got {version}"
    return ""


def _replace(replacements: Replacements, bitsandbytes: ModuleType, cuda: bool) -> None:
    from peftk.integrations.bitsandbytes import kernels, on_cuda, optimizers, products, weights

    for op, run in {**kernels.KERNELS, **optimizers.kernels(bitsandbytes)}.items():
        if kernels.is_defined(op):
            replacements.kernel(op, run)
    for owner in (bitsandbytes, bitsandbytes.autograd._functions):
        replacements.attribute(owner, "matmul_4bit", products.instead_of)
    for owner in (bitsandbytes.functional, bitsandbytes.nn.modules):
        if hasattr(owner, "_convert_weight_packed_for_cpu"):
            replacements.attribute(owner, "_convert_weight_packed_for_cpu", weights.left_as_it_is)
    if cuda:
        on_cuda.replace(replacements)
