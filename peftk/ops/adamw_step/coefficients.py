"""What a step's hyper-parameters come to: the eight numbers that every kernel takes, computed once in fp64."""

from __future__ import annotations

import math
from typing import NamedTuple


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
    if step < 1:
        raise ValueError(f"step: expected the number of this step, 1 or more, got {step}")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name}: expected a number in [0, 1), got {beta}")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number, 0 or more, got {value}")
    if not math.isfinite(grad_factor):
        raise ValueError(f"grad_factor: expected a finite number, got {grad_factor}")
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
