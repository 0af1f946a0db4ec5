"""The definition: every operation rounds on its own, in fp32, or in fp64 for fp64 parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftk.ops.adamw_step.coefficients import Coefficients
from peftk.ops.step_lists import reference_step, reference_step8, square_root


def update(
    param: torch.Tensor, grad: torch.Tensor, m: torch.Tensor, v: torch.Tensor, coefficients: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The new parameter in m's dtype, and the new moments."""
    c = Coefficients(*coefficients)
    g = grad.to(m.dtype) * c.grad_factor
    m = m + (g - m) * c.weight1
    v = v * c.beta2 + (g * c.weight2) * g
    denominator = square_root(v) * c.root_factor + c.eps
    return param.to(m.dtype) * c.decay - (m * c.step_size) / denominator, m, v


IMPLEMENTATION = reference_step(update)
IMPLEMENTATION8 = reference_step8(update, (True, False))
