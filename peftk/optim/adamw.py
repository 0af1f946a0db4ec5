"""AdamW (Loshchilov and Hutter 2019) with its moments in 32 bits, or in 8 bits by blocks of 256 (Dettmers et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peftk.ops.adamw_step import unchecked, unchecked8
from peftk.ops.adamw_step.coefficients import coefficients
from peftk.optim.frame import Frame, sign_of
from peftk.optim.moments import AVERAGE, SQUARE
from peftk.optim.stepping import Formula


def _coefficients(group: Mapping[str, Any], step: int) -> Sequence[float]:
    beta1, beta2 = group["betas"]
    return coefficients(step, float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], sign_of(group))


class AdamW(Frame):
    """torch.optim.AdamW's step: weight decay decoupled and before the update, moments in fp32 whatever the parameters are.

    ``load_state_dict`` takes torch's and bitsandbytes' AdamW as well; ``peftk.optim.to_torch`` and ``to_bitsandbytes`` turn
    ``state_dict()`` into theirs.
    """

    __doc__ += Frame.OPTIONS
    FORMULA = Formula((AVERAGE, SQUARE), unchecked, unchecked8, 2, _coefficients)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        if amsgrad:
            raise ValueError("amsgrad: expected False, got True: peftk's AdamW keeps no maximum of past moments")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), **options)


class AdamW8bit(AdamW):
    """AdamW with moments in 8 bits: 2.03 bytes of state a parameter instead of 8."""

    def __init__(self, params: Iterable[Any], *arguments: Any, **options: Any) -> None:
        super().__init__(params, *arguments, **{"bits": 8} | options)


class PagedAdamW(AdamW):
    """AdamW with paged moments."""

    def __init__(self, params: Iterable[Any], *arguments: Any, **options: Any) -> None:
        super().__init__(params, *arguments, **{"paged": True} | options)


class PagedAdamW8bit(AdamW8bit):
    """AdamW with paged moments in 8 bits."""

    def __init__(self, params: Iterable[Any], *arguments: Any, **options: Any) -> None:
        super().__init__(params, *arguments, **{"paged": True} | options)
