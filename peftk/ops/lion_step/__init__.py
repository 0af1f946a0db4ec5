"""lion_step, lion_step8: one step of Lion on a list of tensors, in place (Chen et al. 2023, "Symbolic Discovery of Optimization
Algorithms", algorithm 2).

    g = grad * grad_factor
    p = p * (1 - lr * weight_decay) - sign(m * beta1 + g * (1 - beta1)) * lr
    m = m * beta2 + g * (1 - beta2)

with the old m in the second line, in fp32, each operation rounded on its own; the coefficients are rounded once from fp64. The
sign of zero is zero: what has neither gradient nor moment does not move. p is rounded once to its dtype. All implementations
agree bit for bit. lion_step8 keeps m in 8 bits with the signed code: adamw_step has the layout, and what becomes of a block that
is not finite. A gradient that is NaN makes its own p NaN.
"""

from __future__ import annotations

from peftk.ops.lion_step import cpu, reference
from peftk.ops.lion_step.reference import Coefficients
from peftk.ops.step_lists import StepOp, Tensors, check, check_numbers

TABLE = (cpu.IMPLEMENTATION, reference.IMPLEMENTATION)
TABLE8 = (cpu.IMPLEMENTATION8, reference.IMPLEMENTATION8)
unchecked = StepOp("lion_step", ("exp_avg",), TABLE)
unchecked8 = StepOp("lion_step8", ("state1", "absmax1"), TABLE8)


def coefficients(lr: float, beta1: float, beta2: float, weight_decay: float, grad_factor: float = 1.0) -> Coefficients:
    """What every kernel takes. ValueError names the argument that is out of its range."""
    check_numbers({"beta1": beta1, "beta2": beta2}, {"lr": lr, "weight_decay": weight_decay}, grad_factor)
    return Coefficients(grad_factor, 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, lr)


def lion_step(
    params: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.99,
    weight_decay: float = 0.0,
    grad_factor: float = 1.0,
) -> None:
    """In place on params and exp_avg; lists as adamw_step's. TypeError or ValueError names the list, the index in it and what
    doesn't fit; nothing has been written then."""
    c = coefficients(lr, beta1, beta2, weight_decay, grad_factor)
    check(params, grads=grads, exp_avg=exp_avg)
    if params:
        unchecked(params, grads, exp_avg, c)


def lion_step8(
    params: Tensors,
    grads: Tensors,
    state1: Tensors,
    absmax1: Tensors,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.99,
    weight_decay: float = 0.0,
    grad_factor: float = 1.0,
) -> None:
    """As lion_step, in place on params, state1 and absmax1: lists as adamw_step8's."""
    c = coefficients(lr, beta1, beta2, weight_decay, grad_factor)
    check(params, grads=grads, state1=state1, absmax1=absmax1)
    if params:
        unchecked8(params, grads, state1, absmax1, c)
