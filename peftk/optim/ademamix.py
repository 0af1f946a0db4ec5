"""AdEMAMix (Pagliardini et al. 2024): AdamW with a second, slow average of the gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peftk.ops.ademamix_step import coefficients, unchecked, unchecked8
from peftk.ops.step_lists import check_numbers
from peftk.optim.frame import Frame, sign_of
from peftk.optim.moments import AVERAGE, SLOW, SQUARE
from peftk.optim.stepping import Formula


def scheduled_alpha(step: int, alpha: float, t_alpha: int | None) -> float:
    """Rises in a straight line from 0 to alpha in ``t_alpha`` steps; alpha throughout for None."""
    return alpha if not t_alpha else alpha * min(step / t_alpha, 1.0)


def scheduled_beta3(step: int, beta1: float, beta3: float, t_beta3: int | None) -> float:
    """From beta1 to beta3 in ``t_beta3`` steps, along 1 / ln(beta), which goes with the half-life; beta3 throughout for None."""
    if not t_beta3 or step >= t_beta3:
        return beta3
    share = step / t_beta3
    inverse = (1 - share) * _inverse_logarithm(beta1) + share * _inverse_logarithm(beta3)
    return min(math.exp(1 / inverse), beta3) if inverse else 0.0


def _inverse_logarithm(beta: float) -> float:
    return 1 / math.log(beta) if beta else 0.0


def _coefficients(group: Mapping[str, Any], step: int) -> Sequence[float]:
    beta1, beta2, beta3 = group["betas"]
    for name in ("t_alpha", "t_beta3"):
        if not (group[name] is None or (isinstance(group[name], int) and group[name] >= 0)):
            raise ValueError(f"{name}: expected None or a number of steps, got {group[name]!r:.200}")
    check_numbers({"betas[0]": beta1, "betas[2]": beta3}, {"alpha": group["alpha"]}, 1.0)
    alpha = scheduled_alpha(step, group["alpha"], group["t_alpha"])
    beta3 = scheduled_beta3(step, beta1, beta3, group["t_beta3"])
    rates = group["eps"], group["weight_decay"], sign_of(group)
    return coefficients(step, float(group["lr"]), beta1, beta2, beta3, alpha, *rates)


class AdEMAMix(Frame):
    """AdamW's step, with ``alpha`` times a slow average of the gradients (``betas[2]``) added to the fast one, which alone has
    its bias corrected. ``t_alpha`` and ``t_beta3``: steps in which alpha rises to its value, and the slow average slows down to
    its own (the paper: as many as the training has); None for constants.

    ``load_state_dict`` takes bitsandbytes' AdEMAMix as well; ``peftk.optim.to_bitsandbytes`` turns ``state_dict()`` into its own.
    """

    __doc__ += Frame.OPTIONS
    FORMULA = Formula((AVERAGE, SQUARE, SLOW), unchecked, unchecked8, 3, _coefficients)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Any,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, alpha=alpha, t_alpha=t_alpha, t_beta3=t_beta3, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults, **options)


class AdEMAMix8bit(AdEMAMix):
    """AdEMAMix with moments in 8 bits: 3.05 bytes of state a parameter instead of 12."""

    def __init__(self, params: Iterable[Any], *arguments: Any, **options: Any) -> None:
        super().__init__(params, *arguments, **{"bits": 8} | options)


class PagedAdEMAMix(AdEMAMix):
    """AdEMAMix with paged moments."""

    def __init__(self, params: Iterable[Any], *arguments: Any, **options: Any) -> None:
        super().__init__(params, *arguments, **{"paged": True} | options)


class PagedAdEMAMix8bit(AdEMAMix8bit):
    """AdEMAMix with paged moments in 8 bits."""

    def __init__(self, params: Iterable[Any], *arguments: Any, **options: Any) -> None:
        super().__init__(params, *arguments, **{"paged": True} | options)
