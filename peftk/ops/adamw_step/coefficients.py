"""What a step's hyper-parameters come to: the eight numbers that every kernel takes, computed once in fp64."""

from __future__ import annotations

import math
from typing import NamedTuple

from peftk.ops.step_lists import check_numbers, check_step


class Coefficients(NamedTuple):
    """In the order in which kernels take them; each is rounded once to fp32 there."""

    grad_factor: float  # of the gradient, before anything else: -1 maximises, 1 / scale undoes a loss scale
    decay: float  # 1 - lr * weight_decay
    weight1: float  # 1 - beta1
    beta2: float
    weight2: float  # 1 - beta2
    step_size: float  # lr / (1 - beta1^step)
    root_factor: float  # 1 / sqrt(1 - beta2^step)
    eps: float


def coefficients(
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, grad_factor: float = 1.0
) -> Coefficients:
    """Of step number ``step``, the first being 1. ValueError names the argument that is out of its range."""
    check_step(step)
    check_numbers({"beta1": beta1, "beta2": beta2}, {"lr": lr, "eps": eps, "weight_decay": weight_decay}, grad_factor)
    return Coefficients(
        grad_factor,
        1 - lr * weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        lr / (1 - beta1**step),
        1 / math.sqrt(1 - beta2**step),
        eps,
    )
