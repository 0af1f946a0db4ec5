"""nf4_lora_linear_rows: y[i] = W x[i] + bias + scale_g B_g A_g z[i], W in 4 bits and common to all rows, g the adapter of row i.

Shapes: x, z (b, ..., k), W (n, k), bias (n,), y (b, ..., n); A_g (r_g, k) and B_g (n, r_g), each of its own rank. index has b
entries: x[i], all its rows, runs with adapter index[i], -1 for none. z is the branches' input, x if None (what drops out of it
does so before). One product by W serves all rows; an adapter's branch is computed for its own rows only, with S_g = z_g A_g^T and
T_g = scale_g dy_g B_g of these:
    dx = dy W (+ T A where z is None)    dz = T A    dA_g = T_g^T z_g    dB_g = scale_g dy_g^T S_g
With 16-bit x the branches round A, B, S and T to x.dtype; sums in fp32. An adapter that no row has gets zeros as its gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftk.format.nf4 import NF4Weight
from peftk.native import NATIVE_DTYPE, native
from peftk.ops import dispatch, library
from peftk.ops.nf4_linear import autocast_input, check_linear
from peftk.ops.nf4_lora_linear import check_low_rank
from peftk.ops.nf4_lora_linear_rows import autograd, cpu, reference
from peftk.ops.nf4_lora_linear_rows.groups import counts

TABLE = (cpu.FORWARD, reference.FORWARD)
TABLE_BACKWARD = (cpu.BACKWARD, reference.BACKWARD)


def nf4_lora_linear_rows(
    x: torch.Tensor,
    w4: NF4Weight,
    A: Sequence[torch.Tensor],
    B: Sequence[torch.Tensor],
    scale: Sequence[float],
    index: Sequence[int],
    bias: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (b, ..., k), w4 (n, k), lists of A (r, k), B (n, r) and scales, one an adapter, index of b ints -> (b, ..., n) in
    x.dtype. A and B may be fp32 with 16-bit x; their gradients come in their own dtype. Differentiable in x, z, A, B and bias.
    TypeError or ValueError names the argument that doesn't fit."""
    if not torch.compiler.is_compiling() and (y := cpu.run_straight(x, w4, A, B, scale, index, bias, z)) is not None:
        return y
    x, bias = check_linear(x, w4, bias)
    z = z if z is None else autocast_input(z)
    A, B, scale, index = list(A), list(B), list(scale), list(index)
    if not len(A) == len(B) == len(scale):
        raise ValueError(f"A, B, scale: expected as many of each, got {len(A)}, {len(B)} and {len(scale)}")
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        check_low_rank(x, w4.shape, a, b, z, 0.0, f"[{i}]")
    check_index(x, index, len(A))
    facts = (w4.shape[0], w4.block_size, w4.quant_type)
    return torch.ops.peftk.nf4_lora_linear_rows(x, *w4.tensors(), A, B, bias, z, index, scale, *facts)


def has_kernel(x: torch.Tensor) -> bool:
    """Whether a kernel of ours takes x. Where none does, nf4_linear and torch's products by parts are faster than the
    reference."""
    return (
        dispatch.device_type(x) == "cpu" and x.dtype in NATIVE_DTYPE and (torch.compiler.is_compiling() or native() is not None)
    )


def check_index(x: torch.Tensor, index: list[int], adapters: int) -> None:
    """An entry for each of x's rows, of adapters that there are."""
    if x.dim() < 2 or len(index) != x.shape[0]:
        raise ValueError(f"index: expected {x.shape[0] if x.dim() > 1 else 'x (b, ..., k) and b'} entries, got {len(index)}")
    if index and not (min(index) >= -1 and max(index) < adapters):
        raise ValueError(f"index: expected numbers from -1 to {adapters - 1}, got {min(index)} to {max(index)}")


def _run_forward(*arguments):
    return dispatch.select("nf4_lora_linear_rows", TABLE, *arguments)(*arguments)


def _run_backward(*arguments):
    return dispatch.select("nf4_lora_linear_rows backward", TABLE_BACKWARD, *arguments)(*arguments)


def _fake_forward(x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, index, scale, n, *_):
    kept = zip(counts(index, x, len(A)), A, strict=True)
    return [x.new_empty((*x.shape[:-1], n)), *(x.new_empty((count, a.shape[0])) for count, a in kept)]


def _fake_backward(dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, *facts):
    inputs = [x.new_empty(x.shape if need else (0,)) for need in facts[-2:]]
    return inputs + [factor.new_empty(factor.shape) for factor in (*A, *B)]


_WEIGHT = "Tensor packed, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset, Tensor[] A, Tensor[] B"
_FACTS = "int[] index, float[] scale, SymInt n, int block_size, str quant_type"
library.define(  # y, then every S
    f"nf4_lora_linear_rows_forward(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? z, {_FACTS}) -> Tensor[]",
    _run_forward,
    _fake_forward,
)
library.define(  # dx, dz, then every dA, then every dB
    f"nf4_lora_linear_rows_backward(Tensor dy, Tensor x, Tensor? z, Tensor[] s, {_WEIGHT}, {_FACTS}, bool need_dx, bool need_dz)"
    " -> Tensor[]",
    _run_backward,
    _fake_backward,
)
library.define(
    f"nf4_lora_linear_rows(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? z, {_FACTS}) -> Tensor",
    lambda *arguments: _run_forward(*arguments)[0],
    lambda *arguments: _fake_forward(*arguments)[0],
    autograd.nf4_lora_linear_rows,
)
