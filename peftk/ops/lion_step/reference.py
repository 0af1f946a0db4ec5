"""The definition: every operation rounds on its own, in fp32, or in fp64 for fp64 parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from peftk.ops.step_lists import reference_step, reference_step8


class Coefficients(NamedTuple):
    """In the order in which kernels take them; each is rounded once to fp32 there."""

    grad_factor: float  # of the gradient, before anything else: -1 maximises, 1 / scale undoes a loss scale
    decay: float  # 1 - lr * weight_decay
    beta1: float
    weight1: float  # 1 - beta1
    beta2: float
    weight2: float  # 1 - beta2
    lr: float


def update(
    param: torch.Tensor, grad: torch.Tensor, m: torch.Tensor, coefficients: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new parameter in m's dtype, and the new moment."""
    c = Coefficients(*coefficients)
    g = grad.to(m.dtype) * c.grad_factor
    direction = m * c.beta1 + g * c.weight1
    direction = torch.where(direction.isnan(), direction, direction.sign())  # torch's sign of NaN is 0
    return param.to(m.dtype) * c.decay - direction * c.lr, m * c.beta2 + g * c.weight2


IMPLEMENTATION = reference_step(update)
IMPLEMENTATION8 = reference_step8(update, (True,))
