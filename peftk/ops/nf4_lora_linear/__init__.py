"""nf4_lora_linear: y = x W^T + bias + scale * D(z) A^T B^T, W in 4 bits (Hu et al. 2021, section 4.1, on a QLoRA base).

Shapes: x, z (..., k), W (n, k), A (r, k), B (n, r), bias (n,), y (..., n). z is the low-rank branch's input, x if None; D is
dropout on it (philox_dropout). Saved for the backward pass: x (z) and S = D(z) A^T, nothing of W's size:
    T = scale * dy B    dx = dy W (+ D(T A) where z is None)    dz = D(T A)    dA = T^T D(z)    dB = scale * dy^T S
With 16-bit x the branch rounds A, B, S and T to x.dtype; sums in fp32.
nf4_lora_linear_many: several W with branches of their own that share x (q, k, v; gate, up); dx and dz are sums over them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

import torch

from peftk.format.nf4 import NF4Weight
from peftk.ops import dispatch, gpu, library
from peftk.ops.nf4_linear import autocast_input, check_linear, check_many, facts_of, per_weight
from peftk.ops.nf4_lora_linear import autograd, cpu, cuda, on_gpu, reference
from peftk.ops.philox_dropout import draw_seed


def _triton(function: str, reasons: Callable[..., list[str]], kernel: str | None = None) -> dispatch.Implementation:
    return gpu.triton_implementation("nf4_lora_linear", lambda *arguments: reasons(gpu.triton(), *arguments), function, kernel)


TABLE = (cpu.FORWARD, cuda.FORWARD, _triton("run", on_gpu.reasons_against, "kernel"), reference.FORWARD)
TABLE_BACKWARD = (
    cpu.BACKWARD,
    cuda.BACKWARD,
    _triton("run_backward", on_gpu.reasons_against_backward, "kernel_backward"),
    reference.BACKWARD,
)
TABLE_MANY = (cpu.MANY, cuda.MANY, _triton("run_many", on_gpu.reasons_against_many), reference.MANY)
TABLE_MANY_BACKWARD = (
    cpu.MANY_BACKWARD,
    cuda.MANY_BACKWARD,
    _triton("run_many_backward", on_gpu.reasons_against_many_backward),
    reference.MANY_BACKWARD,
)


@overload
def nf4_lora_linear(
    x: torch.Tensor,
    w4: NF4Weight,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> torch.Tensor: ...
@overload
def nf4_lora_linear(
    x: torch.Tensor,
    w4: Sequence[NF4Weight],
    A: Sequence[torch.Tensor],
    B: Sequence[torch.Tensor],
    scale: float | Sequence[float],
    bias: Sequence[torch.Tensor | None] | None = None,
    z: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: Sequence[int] | None = None,
) -> list[torch.Tensor]: ...
def nf4_lora_linear(x, w4, A, B, scale, bias=None, z=None, dropout=0.0, seed=None):
    """x (..., k), w4 (n, k), A (r, k), B (n, r), bias (n,), z as x -> (..., n) in x.dtype. A and B may be fp32 with 16-bit x;
    their gradients come in their own dtype. seed None draws one from torch's generator where dropout > 0. Differentiable in x,
    z, A, B and bias. TypeError or ValueError names the argument that doesn't fit.

    A list of weights of one k, lists of as many A, B, scales (or one scale for all) and seeds, and None or as many biases: the
    list of the same outputs, bit for bit. x is packed once, and dx is one product whose sums run over all of them."""
    if isinstance(w4, (list, tuple)):
        return _many(x, w4, A, B, scale, bias, z, dropout, seed)
    if z is None and not dropout and not torch.compiler.is_compiling() and type(w4) is NF4Weight:
        if (y := cpu.run_straight(x, w4, A, B, scale, bias)) is not None:
            return y
    x, bias = check_linear(x, w4, bias)
    z = z if z is None else autocast_input(z)
    check_low_rank(x, w4.shape, A, B, z, dropout)
    seed = (draw_seed() if dropout > 0 else 0) if seed is None else seed
    return torch.ops.peftk.nf4_lora_linear(x, *w4.tensors(), A, B, bias, z, scale, w4.block_size, w4.quant_type, dropout, seed)


def _many(x, w4, A, B, scale, bias, z, dropout, seed) -> list[torch.Tensor]:
    x, bias = check_many(x, w4, bias)
    z, count = z if z is None else autocast_input(z), len(w4)
    A, B = per_weight("A", A, count, optional=False), per_weight("B", B, count, optional=False)
    for i, (w, a, b) in enumerate(zip(w4, A, B, strict=True)):
        check_low_rank(x, w.shape, a, b, z, dropout, f"[{i}]")
    scale = per_weight("scale", [scale] * count if isinstance(scale, (int, float)) else scale, count, optional=False)
    seeds = [(draw_seed() if dropout > 0 else 0) if one is None else one for one in per_weight("seed", seed, count)]
    *weights, _, block_size, quant_type = facts_of(w4)
    facts = (scale, block_size, quant_type, dropout, seeds)
    return torch.ops.peftk.nf4_lora_linear_many(x, *weights, A, B, bias, z, *facts)


def check_low_rank(
    x: torch.Tensor,
    shape: tuple[int, int],
    A: torch.Tensor,
    B: torch.Tensor,
    z: torch.Tensor | None,
    dropout: float,
    at: str = "",
) -> None:
    """The checks of the low-rank branch beside a weight of ``shape`` (n, k). ``at``: where in a list A and B stand."""
    n, k = shape
    if A.dim() != 2 or A.shape[1] != k:
        raise ValueError(f"A{at}: expected (r, {k}), got {tuple(A.shape)}")
    if tuple(B.shape) != (n, A.shape[0]):
        raise ValueError(f"B{at}: expected ({n}, {A.shape[0]}), got {tuple(B.shape)}")
    for name, factor in (("A", A), ("B", B)):
        if not factor.dtype.is_floating_point or factor.device != x.device:
            raise TypeError(f"{name}{at}: expected floats on {x.device}, got {factor.dtype} on {factor.device}")
    if z is not None and (z.shape != x.shape or z.dtype != x.dtype):
        raise ValueError(f"z: expected x's shape {tuple(x.shape)} and {x.dtype}, got {tuple(z.shape)} {z.dtype}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")


def _run_forward(*arguments):
    return dispatch.select("nf4_lora_linear", TABLE, *arguments)(*arguments)


def _run_backward(*arguments):
    return dispatch.select("nf4_lora_linear backward", TABLE_BACKWARD, *arguments)(*arguments)


def _run_many_forward(*arguments):
    return dispatch.select("nf4_lora_linear_many", TABLE_MANY, *arguments)(*arguments)


def _run_many_backward(*arguments):
    return dispatch.select("nf4_lora_linear_many backward", TABLE_MANY_BACKWARD, *arguments)(*arguments)


def _fake_forward(x, packed, absmax, absmax_scale, absmax_offset, A, B, *_):
    return x.new_empty((*x.shape[:-1], B.shape[0])), x.new_empty((*x.shape[:-1], A.shape[0]))


def _fake_backward(dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, *facts):
    need_dx, need_dz = facts[-2:]
    dx, dz = x.shape if need_dx else (0,), x.shape if need_dz else (0,)
    return dy.new_empty(dx), dy.new_empty(dz), A.new_empty(A.shape), B.new_empty(B.shape)


def _fake_many_forward(x, packed, absmax, absmax_scale, absmax_offset, A, B, *_):
    rows = x.shape[:-1]
    return [x.new_empty((*rows, b.shape[0])) for b in B] + [x.new_empty((*rows, a.shape[0])) for a in A]


def _fake_many_backward(dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, *facts):
    need_dx, need_dz = facts[-2:]
    inputs = [x.new_empty(x.shape if need else (0,)) for need in (need_dx, need_dz)]
    return inputs + [factor.new_empty(factor.shape) for factor in (*A, *B)]


_WEIGHT = "Tensor packed, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset, Tensor A, Tensor B"
_FACTS = "float scale, int block_size, str quant_type, float dropout, SymInt seed"
library.define(
    f"nf4_lora_linear_forward(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? z, {_FACTS}) -> (Tensor, Tensor)",
    _run_forward,
    _fake_forward,
)
library.define(
    f"nf4_lora_linear_backward(Tensor dy, Tensor x, Tensor? z, Tensor s, {_WEIGHT}, {_FACTS}, bool need_dx, bool need_dz)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
library.define(
    f"nf4_lora_linear(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? z, {_FACTS}) -> Tensor",
    lambda *arguments: _run_forward(*arguments)[0],
    lambda *arguments: _fake_forward(*arguments)[0],
    autograd.nf4_lora_linear,
)

_WEIGHTS = "Tensor[] packed, Tensor[] absmax, Tensor?[] absmax_scale, Tensor?[] absmax_offset, Tensor[] A, Tensor[] B"
_MANY_FACTS = "float[] scale, int[] block_size, str[] quant_type, float dropout, SymInt[] seed"
library.define(  # every y, then every S
    f"nf4_lora_linear_many_forward(Tensor x, {_WEIGHTS}, Tensor?[] bias, Tensor? z, {_MANY_FACTS}) -> Tensor[]",
    _run_many_forward,
    _fake_many_forward,
)
library.define(  # dx, dz, then every dA, then every dB
    f"nf4_lora_linear_many_backward(Tensor[] dy, Tensor x, Tensor? z, Tensor[] s, {_WEIGHTS}, {_MANY_FACTS},"
    " bool need_dx, bool need_dz) -> Tensor[]",
    _run_many_backward,
    _fake_many_backward,
)
library.define(
    f"nf4_lora_linear_many(Tensor x, {_WEIGHTS}, Tensor?[] bias, Tensor? z, {_MANY_FACTS}) -> Tensor[]",
    lambda x, packed, *others: _run_many_forward(x, packed, *others)[: len(packed)],
    lambda x, packed, *others: _fake_many_forward(x, packed, *others)[: len(packed)],
    autograd.nf4_lora_linear_many,
)
