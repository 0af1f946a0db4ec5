"""lora_linear: y = x W^T + bias + scale * D(z) A^T B^T, W dense (Hu et al. 2021, section 4.1).

Shapes: x, z (..., k), W (n, k), A (r, k), B (n, r), bias (n,), y (..., n). z is the low-rank branch's input, x if None; D is
dropout on it (philox_dropout). Saved for the backward pass: x (z) and S = D(z) A^T; the formulas are nf4_lora_linear's. W may lie
row by row or column by column (Conv1D). A W that is trained gets dW = dy^T x from torch.
"""

from __future__ import annotations

import torch

from peftk.native import NATIVE_DTYPE, native
from peftk.ops import dispatch, library
from peftk.ops.lora_linear import autograd, cpu, reference
from peftk.ops.nf4_linear import autocast_input
from peftk.ops.nf4_lora_linear import check_low_rank
from peftk.ops.philox_dropout import draw_seed

TABLE = (cpu.FORWARD, reference.FORWARD)
TABLE_BACKWARD = (cpu.BACKWARD, reference.BACKWARD)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> torch.Tensor:
    """x (..., k) fp32|bf16|fp16, weight (n, k) in x.dtype, A (r, k), B (n, r), bias (n,), z as x -> (..., n) in x.dtype (under
    autocast: in its dtype). A and B may be fp32 with 16-bit x; their gradients come in their own dtype. seed None draws one from
    torch's generator where dropout > 0. Differentiable in x, z, A, B, bias and weight. TypeError or ValueError names the argument
    that doesn't fit."""
    x, weight, bias = _check_base(x, weight, bias)
    z = z if z is None else autocast_input(z)
    check_low_rank(x, weight.shape, A, B, z, dropout)
    seed = (draw_seed() if dropout > 0 else 0) if seed is None else seed
    return torch.ops.peftk.lora_linear(x, weight, A, B, bias, z, scale, dropout, seed)


def has_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a kernel of ours takes these. Where none does, torch's products by parts are faster than the reference."""
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter)
    is_cpu = dispatch.device_type(x) == "cpu"
    cpu_kernel = is_cpu and x.dtype in NATIVE_DTYPE and (torch.compiler.is_compiling() or native() is not None)
    return plain and cpu_kernel


def _check_base(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The three in the dtype of the computation."""
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape (n, k), got {tuple(weight.shape)}")
    n, k = weight.shape
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x: expected (..., {k}) for a weight of shape ({n}, {k}), got {tuple(x.shape)}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias: expected shape ({n},), got {tuple(bias.shape)}")
    for name, t in (("x", x), ("weight", weight)):
        if not t.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating-point tensor, got {t.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x: expected on the weight's {weight.device}, got {x.device}")
    x, weight = autocast_input(x), autocast_input(weight)
    if x.dtype != weight.dtype:
        raise TypeError(f"x: expected the weight's {weight.dtype}, got {x.dtype}")
    return x, weight, bias if bias is None else bias.to(x.dtype)


def _run_forward(*arguments):
    return dispatch.select("lora_linear", TABLE, *arguments)(*arguments)


def _run_backward(*arguments):
    return dispatch.select("lora_linear backward", TABLE_BACKWARD, *arguments)(*arguments)


def _fake_forward(x, weight, A, B, *_):
    return x.new_empty((*x.shape[:-1], B.shape[0])), x.new_empty((*x.shape[:-1], A.shape[0]))


def _fake_backward(dy, x, z, s, weight, A, B, scale, dropout, seed, need_dx, need_dz):
    dx, dz = x.shape if need_dx else (0,), x.shape if need_dz else (0,)
    return dy.new_empty(dx), dy.new_empty(dz), A.new_empty(A.shape), B.new_empty(B.shape)


_WEIGHT, _FACTS = "Tensor weight, Tensor A, Tensor B", "float scale, float dropout, SymInt seed"
library.define(
    f"lora_linear_forward(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? z, {_FACTS}) -> (Tensor, Tensor)",
    _run_forward,
    _fake_forward,
)
library.define(
    f"lora_linear_backward(Tensor dy, Tensor x, Tensor? z, Tensor s, {_WEIGHT}, {_FACTS}, bool need_dx, bool need_dz)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
library.define(
    f"lora_linear(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? z, {_FACTS}) -> Tensor",
    lambda *arguments: _run_forward(*arguments)[0],
    lambda *arguments: _fake_forward(*arguments)[0],
    autograd.lora_linear,
)
