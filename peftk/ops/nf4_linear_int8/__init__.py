"""nf4_linear_int8: y = x W^T + bias for inference, W in 4 bits, x rounded to 8 bits as it comes; dots in integers.

Shapes: x (..., k), W (n, k), bias (n,), y (..., n). With runs of 64 neighbours along k in each row of x, blocks of W, and the
4-bit code's int8_scale c (112 for NF4, 120 for FP4; peftk/format/code4.py):
    s = max|x| / 127 of a run    q = round(x / s)    t = round(c * table value of a weight's code)    (both to nearest even)
    y = sum over runs of s * absmax / c * (sum of q * t) + bias    (fp32 sums, y in x.dtype)
A run whose max|x| lies below 2^-100 counts as zero; a row of x with Inf or NaN in it gives a row of NaN. What the rounding costs,
of y's norm at k = 4096: 0.8 % with Gaussian x (0.6 % of it x's, 0.5 % the table's), 1.2 % with rectified x, 1.8 % with one
channel in 500 a hundred times as large as the others. The 4 bits of W cost 9 %.

The fast kernel wants k % 64 == 0, blocks of 64 or more, and a processor with AVX512-BF16 (VNNI, VBMI). Everything else is an fp32
product of the rounded operands: the same result up to fp32's rounding, and slower than ``nf4_linear``.
"""

from __future__ import annotations

import torch

from peftk.format.nf4 import NF4Weight
from peftk.ops import dispatch, library
from peftk.ops.nf4_linear import check_linear
from peftk.ops.nf4_linear_int8 import autograd, cpu, reference

TABLE = (cpu.IMPLEMENTATION, reference.IMPLEMENTATION)


def nf4_linear_int8(x: torch.Tensor, w4: NF4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., k) fp32|bf16|fp16, w4 of shape (n, k), bias (n,) -> (..., n) in x.dtype (under autocast: in its dtype).
    Where a gradient of x or bias is wanted this is ``nf4_linear``: exact, and differentiable. TypeError or ValueError names the
    argument that doesn't fit."""
    if not torch.compiler.is_compiling() and type(w4) is NF4Weight and (y := cpu.run_straight(x, w4, bias)) is not None:
        return y
    x, bias = check_linear(x, w4, bias)
    return torch.ops.peftk.nf4_linear_int8(x, *w4.tensors(), w4.shape[0], w4.block_size, w4.quant_type, bias)


def _run(x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias):
    arguments = (x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias)
    return dispatch.select("nf4_linear_int8", TABLE, *arguments)(*arguments)


library.define(
    "nf4_linear_int8(Tensor x, Tensor packed, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset, SymInt n,"
    " int block_size, str quant_type, Tensor? bias) -> Tensor",
    _run,
    lambda x, packed, absmax, scale, offset, n, block_size, quant_type, bias: x.new_empty((*x.shape[:-1], n)),
    autograd.nf4_linear_int8,
)
