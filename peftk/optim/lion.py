"""Lion (Chen et al. 2023): the sign of an average of gradients, one moment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peftk.ops.lion_step import coefficients, unchecked, unchecked8
from peftk.optim.frame import Frame, sign_of
from peftk.optim.moments import AVERAGE
from peftk.optim.stepping import Formula


def _coefficients(group: Mapping[str, Any], step: int) -> Sequence[float]:
    beta1, beta2 = group["betas"]
    return coefficients(float(group["lr"]), beta1, beta2, group["weight_decay"], sign_of(group))


class Lion(Frame):
    """Every parameter moves by lr along the sign of ``betas[0] * exp_avg + (1 - betas[0]) * grad``; weight decay is decoupled.
    The paper takes a rate 3 to 10 times smaller, and a weight decay as many times larger, than AdamW's.

    ``load_state_dict`` takes bitsandbytes' Lion as well; ``peftk.optim.to_bitsandbytes`` turns ``state_dict()`` into its own.
    """

    __doc__ += Frame.OPTIONS
    FORMULA = Formula((AVERAGE,), unchecked, unchecked8, 2, _coefficients)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay), **options)


class Lion8bit(Lion):
    """Lion with its moment in 8 bits: 1.02 bytes of state a parameter instead of 4."""

    def __init__(self, params: Iterable[Any], *arguments: Any, **options: Any) -> None:
        super().__init__(params, *arguments, **{"bits": 8} | options)


class PagedLion(Lion):
    """Lion with a paged moment."""

    def __init__(self, params: Iterable[Any], *arguments: Any, **options: Any) -> None:
        super().__init__(params, *arguments, **{"paged": True} | options)


class PagedLion8bit(Lion8bit):
    """Lion with a paged moment in 8 bits."""

    def __init__(self, params: Iterable[Any], *arguments: Any, **options: Any) -> None:
        super().__init__(params, *arguments, **{"paged": True} | options)
