"""nf4_linear: y = x W^T + bias, W in 4 bits (Dettmers et al. 2023, QLoRA, equation 5); nf4_linear_dx: dx = dy W.

Shapes: x (..., k), W (n, k), bias (n,), y (..., n). Sums in fp32, results in x.dtype. W is frozen: gradients go to x and bias.
W is decoded in registers for a few rows of x, else a panel at a time; no whole copy of it is ever written.

On a CPU every shape is right. Where k is no multiple of 16 the elements are decoded one by one: some 8 ms more forward and 11 ms
more for dx at 4096x4096 on two cores of a Zen 4, whatever m is (20 times as long at m = 1, 1.2 times at m = 512). bf16 x is
multiplied by bf16 dot products where the machine has them; fp16 x always in fp32, since bf16 would drop three of its bits.
"""

from __future__ import annotations

import torch

from peftk.format.nf4 import NF4Weight
from peftk.ops import dispatch, library
from peftk.ops.nf4_dequantize import check_constants
from peftk.ops.nf4_linear import autograd, cpu, reference

TABLE = (cpu.FORWARD, reference.FORWARD)
TABLE_DX = (cpu.DX, reference.DX)


def nf4_linear(x: torch.Tensor, w4: NF4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., k) fp32|bf16|fp16, w4 of shape (n, k), bias (n,) -> (..., n) in x.dtype (under autocast: in its dtype).
    Differentiable in x and bias. TypeError or ValueError names the argument that doesn't fit."""
    if not torch.compiler.is_compiling() and type(w4) is NF4Weight and (y := cpu.run_straight(x, w4, bias)) is not None:
        return y
    x, bias = check_linear(x, w4, bias)
    return torch.ops.peftk.nf4_linear(x, *w4.tensors(), w4.shape[0], w4.block_size, w4.quant_type, bias)


def check_linear(x: torch.Tensor, w4: NF4Weight, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The checks that every product with a 4-bit weight shares; x and bias in the dtype of the computation."""
    if not isinstance(w4, NF4Weight):
        raise TypeError(f"w4: expected an NF4Weight, got {type(w4).__name__}")
    if len(w4.shape) != 2:
        raise ValueError(f"w4: expected a weight of shape (n, k), got {tuple(w4.shape)}")
    check_constants(*w4.tensors(), w4.shape.numel(), w4.block_size, w4.quant_type)
    n, k = w4.shape
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x: expected (..., {k}) for a weight of shape ({n}, {k}), got {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if x.device != w4.device:
        raise ValueError(f"x: expected on the weight's {w4.device}, got {x.device}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias: expected shape ({n},), got {tuple(bias.shape)}")
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
