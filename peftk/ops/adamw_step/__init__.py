"""adamw_step, adamw_step8: one step of AdamW on a list of tensors, in place (Loshchilov and Hutter 2019, algorithm 2; decoupled
weight decay before the update, as torch has it).

    g = grad * grad_factor
    m = m + (g - m) * (1 - beta1)
    v = v * beta2 + (g * (1 - beta2)) * g
    p = p * (1 - lr * weight_decay) - (m * (lr / (1 - beta1^step))) / (sqrt(v) * (1 / sqrt(1 - beta2^step)) + eps)

in fp32, each operation rounded on its own (no FMA; division and square root correctly rounded), the hyper-parameters' eight
coefficients rounded once from fp64: coefficients.py. Then p is rounded once to its dtype. All implementations agree bit for bit.

adamw_step8 keeps m and v in 8 bits, blocks of 256 elements of the flat tensor (Dettmers et al. 2022, sections 2.1 and 2.2):
m = value8_signed[state1] * absmax1[block], v = value8_unsigned[state2] * absmax2[block] before the step. After it
absmax = max |m| and max v over the block, codes nearest to m * (1 / absmax) as in blockwise8_quantize, the lower one on a tie;
p has been updated with m and v before this rounding. A block with nothing above the denormals (absmax < 2^-126) is stored as
zeros with absmax 0. The layout is bitsandbytes': state1, state2, absmax1, absmax2.

A non-finite gradient makes its own p non-finite, and in 8 bits its block's absmax as well; the codes of such a block are
whatever comes.
"""

from __future__ import annotations

from peftk.ops import dispatch, gpu
from peftk.ops.adamw_step import cpu, cuda, reference
from peftk.ops.adamw_step.coefficients import coefficients
from peftk.ops.step_lists import StepOp, Tensors, check


def _against_triton(params: Tensors, *_: object) -> list[str]:
    return gpu.triton().reasons_against(params[0]) + dispatch.reasons_against_dtype("params", params[0].dtype)


TRITON = gpu.triton_implementation("adamw_step", _against_triton)
TRITON8 = gpu.triton_implementation("adamw_step", _against_triton, "run8")
TABLE = (cpu.IMPLEMENTATION, cuda.IMPLEMENTATION, TRITON, reference.IMPLEMENTATION)
TABLE8 = (cpu.IMPLEMENTATION8, cuda.IMPLEMENTATION8, TRITON8, reference.IMPLEMENTATION8)
unchecked = StepOp("adamw_step", ("exp_avg", "exp_avg_sq"), TABLE)
unchecked8 = StepOp("adamw_step8", ("state1", "state2", "absmax1", "absmax2"), TABLE8)


def adamw_step(
    params: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    grad_factor: float = 1.0,
) -> None:
    """Step number ``step`` (the first is 1), in place on params, exp_avg and exp_avg_sq.

    params: contiguous tensors of any shapes, all of one dtype (fp32|bf16|fp16) and on one device; grads: their shapes and
    dtype; exp_avg, exp_avg_sq: their shapes, fp32. (The reference takes fp64 throughout as well.) TypeError or ValueError names
    the list, the index in it and what doesn't fit; nothing has been written then.
    """
    c = coefficients(step, lr, beta1, beta2, eps, weight_decay, grad_factor)
    check(params, grads=grads, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    if params:
        unchecked(params, grads, exp_avg, exp_avg_sq, c)


def adamw_step8(
    params: Tensors,
    grads: Tensors,
    state1: Tensors,
    state2: Tensors,
    absmax1: Tensors,
    absmax2: Tensors,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    grad_factor: float = 1.0,
) -> None:
    """As adamw_step, in place on params, state1, state2, absmax1 and absmax2.

    state1, state2: params' shapes, uint8: signed codes of m, unsigned codes of v; absmax1, absmax2: (ceil(numel / 256),) fp32.
    A fresh state is state1 = 127, state2 = 0 (the codes of zero) and absmax = 0.
    """
    c = coefficients(step, lr, beta1, beta2, eps, weight_decay, grad_factor)
    check(params, grads=grads, state1=state1, state2=state2, absmax1=absmax1, absmax2=absmax2)
    if params:
        unchecked8(params, grads, state1, state2, absmax1, absmax2, c)
