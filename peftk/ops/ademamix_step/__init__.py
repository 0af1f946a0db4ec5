"""ademamix_step, ademamix_step8: one step of AdEMAMix on a list of tensors, in place (Pagliardini et al. 2024, "The AdEMAMix
Optimizer: Better, Faster, Older", algorithm 1; weight decay decoupled and before the update, as adamw_step has it).

    g = grad * grad_factor
    m = m + (g - m) * (1 - beta1)
    v = v * beta2 + (g * (1 - beta2)) * g
    slow = slow + (g - slow) * (1 - beta3)
    p = p * (1 - lr * weight_decay)
        - (m * (lr / (1 - beta1^step)) + slow * (lr * alpha)) / (sqrt(v) * (1 / sqrt(1 - beta2^step)) + eps)

in fp32, each operation rounded on its own; the coefficients are rounded once from fp64. p is rounded once to its dtype. All
implementations agree bit for bit. ademamix_step8 keeps the moments in 8 bits, m and slow with the signed code, v with the
unsigned one: adamw_step has the layout, and what becomes of a block that is not finite.
"""

from __future__ import annotations

import math

from peftk.ops.ademamix_step import cpu, reference
from peftk.ops.ademamix_step.reference import Coefficients
from peftk.ops.step_lists import StepOp, Tensors, check, check_numbers, check_step

TABLE = (cpu.IMPLEMENTATION, reference.IMPLEMENTATION)
TABLE8 = (cpu.IMPLEMENTATION8, reference.IMPLEMENTATION8)
unchecked = StepOp("ademamix_step", ("exp_avg", "exp_avg_sq", "exp_avg_slow"), TABLE)
unchecked8 = StepOp("ademamix_step8", ("state1", "state2", "state3", "absmax1", "absmax2", "absmax3"), TABLE8)


def coefficients(
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    grad_factor: float = 1.0,
) -> Coefficients:
    """Of step number ``step``, the first being 1; alpha and beta3 as they are at that step. ValueError names the argument that is
    out of its range."""
    check_step(step)
    amounts = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
    check_numbers({"beta1": beta1, "beta2": beta2, "beta3": beta3}, amounts, grad_factor)
    return Coefficients(
        grad_factor,
        1 - lr * weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        1 - beta3,
        lr / (1 - beta1**step),
        lr * alpha,
        1 / math.sqrt(1 - beta2**step),
        eps,
    )


def ademamix_step(
    params: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    exp_avg_slow: Tensors,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    beta3: float = 0.9999,
    alpha: float = 5.0,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    grad_factor: float = 1.0,
) -> None:
    """Step number ``step`` (the first is 1), in place on params and the moments; lists as adamw_step's. TypeError or ValueError
    names the list, the index in it and what doesn't fit; nothing has been written then."""
    c = coefficients(step, lr, beta1, beta2, beta3, alpha, eps, weight_decay, grad_factor)
    check(params, grads=grads, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, exp_avg_slow=exp_avg_slow)
    if params:
        unchecked(params, grads, exp_avg, exp_avg_sq, exp_avg_slow, c)


def ademamix_step8(
    params: Tensors,
    grads: Tensors,
    state1: Tensors,
    state2: Tensors,
    state3: Tensors,
    absmax1: Tensors,
    absmax2: Tensors,
    absmax3: Tensors,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    beta3: float = 0.9999,
    alpha: float = 5.0,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    grad_factor: float = 1.0,
) -> None:
    """As ademamix_step, in place on params, codes and absmax: of m, v and slow in this order; lists as adamw_step8's."""
    c = coefficients(step, lr, beta1, beta2, beta3, alpha, eps, weight_decay, grad_factor)
    lists = dict(state1=state1, state2=state2, state3=state3, absmax1=absmax1, absmax2=absmax2, absmax3=absmax3)
    check(params, grads=grads, **lists)
    if params:
        unchecked8(params, grads, *lists.values(), c)
