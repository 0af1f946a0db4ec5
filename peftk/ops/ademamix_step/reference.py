"""The definition: every operation rounds on its own, in fp32, or in fp64 for fp64 parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from peftk.ops.step_lists import reference_step, reference_step8, square_root


class Coefficients(NamedTuple):
    """In the order in which kernels take them; each is rounded once to fp32 there."""

    grad_factor: float  # of the gradient, before anything else: -1 maximises, 1 / scale undoes a loss scale
    decay: float  # 1 - lr * weight_decay
    weight1: float  # 1 - beta1
    beta2: float
    weight2: float  # 1 - beta2
    weight3: float  # 1 - beta3
    step_size: float  # lr / (1 - beta1^step)
    slow_size: float  # lr * alpha
    root_factor: float  # 1 / sqrt(1 - beta2^step)
    eps: float


def update(
    param: torch.Tensor,
    grad: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    slow: torch.Tensor,
    coefficients: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The new parameter in m's dtype, and the new moments."""
    c = Coefficients(*coefficients)
    g = grad.to(m.dtype) * c.grad_factor
    m = m + (g - m) * c.weight1
    v = v * c.beta2 + (g * c.weight2) * g
    slow = slow + (g - slow) * c.weight3
    denominator = square_root(v) * c.root_factor + c.eps
    return param.to(m.dtype) * c.decay - (m * c.step_size + slow * c.slow_size) / denominator, m, v, slow


IMPLEMENTATION = reference_step(update)
IMPLEMENTATION8 = reference_step8(update, (True, False, True))
