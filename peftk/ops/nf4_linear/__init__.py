"""nf4_linear: y = x W^T + bias, W in 4 bits (Dettmers et al. 2023, QLoRA, equation 5); nf4_linear_dx: dx = dy W.
nf4_linear_many: the same for several W that share x (q, k, v; gate, up); nf4_linear_many_dx: dx = sum of dy W over them.

Shapes: x (..., k), W (n, k), bias (n,), y (..., n). Sums in fp32, results in x.dtype. W is frozen: gradients go to x and bias.
W is decoded in registers for a few rows of x, else a panel at a time; no whole copy of it is ever written.

On a CPU every shape is right. Where k is no multiple of 16 the elements are decoded one by one: some 8 ms more forward and 11 ms
more for dx at 4096x4096 on two cores of a Zen 4, whatever m is (20 times as long at m = 1, 1.2 times at m = 512). bf16 x is
multiplied by bf16 dot products where the machine has them; fp16 x always in fp32, since bf16 would drop three of its bits.
On a GPU every shape is right too; which kernel takes it is a row of peftk/ops/regimes.csv, and for many rows of x chunks of W are
written to a workspace that stays in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, overload

import torch

from peftk.format.nf4 import NF4Weight
from peftk.ops import dispatch, gpu, library
from peftk.ops.nf4_dequantize import check_constants
from peftk.ops.nf4_linear import autograd, cpu, cuda, on_gpu, reference


def _triton(function: str, reasons: Callable[..., list[str]], kernel: str | None = None) -> dispatch.Implementation:
    return gpu.triton_implementation("nf4_linear", lambda *arguments: reasons(gpu.triton(), *arguments), function, kernel)


TABLE = (cpu.FORWARD, cuda.FORWARD, _triton("run", on_gpu.reasons_against, "kernel"), reference.FORWARD)
TABLE_DX = (cpu.DX, cuda.DX, _triton("run_dx", on_gpu.reasons_against, "kernel_dx"), reference.DX)
TABLE_MANY = (cpu.MANY, cuda.MANY, _triton("run_many", on_gpu.reasons_against_many), reference.MANY)
TABLE_MANY_DX = (cpu.MANY_DX, cuda.MANY_DX, _triton("run_many_dx", on_gpu.reasons_against_many), reference.MANY_DX)

Bias: TypeAlias = torch.Tensor | None


@overload
def nf4_linear(x: torch.Tensor, w4: NF4Weight, bias: Bias = None) -> torch.Tensor: ...
@overload
def nf4_linear(x: torch.Tensor, w4: Sequence[NF4Weight], bias: Sequence[Bias] | None = None) -> list[torch.Tensor]: ...
def nf4_linear(x, w4, bias=None):
    """x (..., k) fp32|bf16|fp16, w4 of shape (n, k), bias (n,) -> (..., n) in x.dtype (under autocast: in its dtype).
    Differentiable in x and bias. TypeError or ValueError names the argument that doesn't fit.

    A list of weights of one k, each with its own n and format, and None or as many biases: the list of the same outputs, bit
    for bit. x is packed once, and dx is one product whose sums run over all of them."""
    if not torch.compiler.is_compiling() and type(w4) is NF4Weight and (y := cpu.run_straight(x, w4, bias)) is not None:
        return y
    if isinstance(w4, (list, tuple)):
        if not torch.compiler.is_compiling() and (ys := cpu.run_straight_many(x, w4, bias)) is not None:
            return ys
        x, bias = check_many(x, w4, bias)
        return torch.ops.peftk.nf4_linear_many(x, *facts_of(w4), bias)
    x, bias = check_linear(x, w4, bias)
    return torch.ops.peftk.nf4_linear(x, *w4.tensors(), w4.shape[0], w4.block_size, w4.quant_type, bias)


def check_many(x: torch.Tensor, w4: Sequence[NF4Weight], bias: Sequence[Bias] | None) -> tuple[torch.Tensor, list[Bias]]:
    """``check_linear`` for a list of weights; messages name the index."""
    biases = per_weight("bias", bias, len(w4))
    checked = [check_linear(x, w, b, f"[{i}]") for i, (w, b) in enumerate(zip(w4, biases, strict=True))]
    return checked[0][0], [b for _, b in checked]


def per_weight(name: str, values: Any, count: int, optional: bool = True) -> list[Any]:
    """One value for each of ``count`` weights: a list of as many, or where ``optional`` None for all of them."""
    if count == 0:
        raise ValueError("w4: expected at least one weight, got an empty list")
    if values is None and optional:
        return [None] * count
    if not isinstance(values, (list, tuple)) or len(values) != count:
        got = f"{len(values)} of them" if isinstance(values, (list, tuple)) else type(values).__name__
        raise ValueError(f"{name}: expected a list of {count}, one for each weight, got {got}")
    return list(values)


def facts_of(w4: Sequence[NF4Weight]) -> tuple[list, ...]:
    """packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type of every weight, a list each."""
    facts = [(*w.tensors(), w.shape[0], w.block_size, w.quant_type) for w in w4]
    return tuple(list(fact) for fact in zip(*facts, strict=True))


def check_linear(x: torch.Tensor, w4: NF4Weight, bias: Bias, at: str = "") -> tuple[torch.Tensor, Bias]:
    """The checks that every product with a 4-bit weight shares; x and bias in the dtype of the computation. ``at``: where in a
    list w4 and bias stand."""
    if not isinstance(w4, NF4Weight):
        raise TypeError(f"w4{at}: expected an NF4Weight, got {type(w4).__name__}")
    if len(w4.shape) != 2:
        raise ValueError(f"w4{at}: expected a weight of shape (n, k), got {tuple(w4.shape)}")
    check_constants(*w4.tensors(), w4.shape.numel(), w4.block_size, w4.quant_type, at and f"w4{at}.")
    n, k = w4.shape
    if x.dim() < 1 or x.shape[-1] != k:
        weight = f"w4{at}" if at else "a weight"
        raise ValueError(f"x: expected (..., {k}) for {weight} of shape ({n}, {k}), got {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if x.device != w4.device:
        raise ValueError(f"x: expected on the weight's {w4.device}, got {x.device}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias{at}: expected shape ({n},), got {tuple(bias.shape)}")
    x = autocast_input(x)
    return x, bias if bias is None else bias.to(x.dtype)


def autocast_input(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype of the enclosing autocast, if any: as torch's own linear does."""
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def _run(x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias):
    arguments = (x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias)
    return dispatch.select("nf4_linear", TABLE, *arguments)(*arguments)


def _run_dx(dy, packed, absmax, absmax_scale, absmax_offset, k, block_size, quant_type):
    arguments = (dy, packed, absmax, absmax_scale, absmax_offset, k, block_size, quant_type)
    return dispatch.select("nf4_linear_dx", TABLE_DX, *arguments)(*arguments)


def _run_many(*arguments):
    return dispatch.select("nf4_linear_many", TABLE_MANY, *arguments)(*arguments)


def _run_many_dx(*arguments):
    return dispatch.select("nf4_linear_many_dx", TABLE_MANY_DX, *arguments)(*arguments)


_WEIGHT = "Tensor packed, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset"
library.define(
    f"nf4_linear(Tensor x, {_WEIGHT}, SymInt n, int block_size, str quant_type, Tensor? bias) -> Tensor",
    _run,
    lambda x, packed, absmax, scale, offset, n, block_size, quant_type, bias: x.new_empty((*x.shape[:-1], n)),
    autograd.nf4_linear,
)
library.define(
    f"nf4_linear_dx(Tensor dy, {_WEIGHT}, SymInt k, int block_size, str quant_type) -> Tensor",
    _run_dx,
    lambda dy, packed, absmax, scale, offset, k, block_size, quant_type: dy.new_empty((*dy.shape[:-1], k)),
)

_WEIGHTS = "Tensor[] packed, Tensor[] absmax, Tensor?[] absmax_scale, Tensor?[] absmax_offset"
library.define(
    f"nf4_linear_many(Tensor x, {_WEIGHTS}, SymInt[] n, int[] block_size, str[] quant_type, Tensor?[] bias) -> Tensor[]",
    _run_many,
    lambda x, packed, absmax, scale, offset, n, *_: [x.new_empty((*x.shape[:-1], one)) for one in n],
    autograd.nf4_linear_many,
)
library.define(
    f"nf4_linear_many_dx(Tensor[] dy, {_WEIGHTS}, SymInt k, int[] block_size, str[] quant_type) -> Tensor",
    _run_many_dx,
    lambda dy, packed, absmax, scale, offset, k, *_: dy[0].new_empty((*dy[0].shape[:-1], k)),
)
