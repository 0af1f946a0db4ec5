"""Adam's and AdamW's update by peftk's fused step; the other optimizers' by bitsandbytes' own functions."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from peftk.format.dynamic8 import STATE_BLOCK
from peftk.integrations.bitsandbytes.weights import is_dynamic8
from peftk.native import NATIVE_DTYPE
from peftk.ops import adamw_step, adamw_step8

Tensor = torch.Tensor
ADAM = "adam"  # what both Adam and AdamW call it: with weight decay it is AdamW


def kernels(bitsandbytes: ModuleType) -> dict[str, Callable[..., Any]]:
    """The ops' kernels by name; none where bitsandbytes (before 0.50) has no functions for a CPU beneath them."""
    own = bitsandbytes.backends.cpu.ops
    wide, narrow = (getattr(own, f"_optimizer_update_{bits}_cpu", None) for bits in ("32bit", "8bit_blockwise"))
    if wide is None or narrow is None:
        return {}
    return {"optimizer_update_32bit": instead_of_32bit(wide), "optimizer_update_8bit_blockwise": instead_of_8bit(narrow)}


def instead_of_32bit(original: Callable[..., None]) -> Callable[..., None]:
    def update(
        optimizer_name: str, g: Tensor, p: Tensor, state1: Tensor, state2: Tensor | None, unorm_vec: Tensor | None,
        max_unorm: float, param_norm: float, beta1: float, beta2: float, beta3: float, alpha: float, eps: float,
        weight_decay: float, step: int, lr: float, gnorm_scale: float, skip_zeros: bool = False,
    ) -> None:  # fmt: skip
        if optimizer_name == ADAM and max_unorm <= 0 and not skip_zeros and fits(p, g, state1, state2, dtype=torch.float32):
            adamw_step(
                [p.detach()], [g], [state1], [state2], step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
                weight_decay=weight_decay, grad_factor=gnorm_scale,
            )  # fmt: skip
            return
        original(
            optimizer_name, g, p, state1, state2, unorm_vec, max_unorm, param_norm, beta1, beta2, beta3, alpha, eps,
            weight_decay, step, lr, gnorm_scale, skip_zeros,
        )  # fmt: skip

    return update


def instead_of_8bit(original: Callable[..., None]) -> Callable[..., None]:
    def update(
        optimizer_name: str, g: Tensor, p: Tensor, state1: Tensor, state2: Tensor | None, beta1: float, beta2: float,
        beta3: float, alpha: float, eps: float, step: int, lr: float, qmap1: Tensor, qmap2: Tensor | None, absmax1: Tensor,
        absmax2: Tensor | None, weight_decay: float, gnorm_scale: float, skip_zeros: bool = False,
    ) -> None:  # fmt: skip
        if (
            optimizer_name == ADAM
            and not skip_zeros
            and fits(p, g, state1, state2, dtype=torch.uint8)
            and is_dynamic8(qmap1, signed=True)
            and is_dynamic8(qmap2, signed=False)
            and all(a.numel() == -(-p.numel() // STATE_BLOCK) and a.is_contiguous() for a in (absmax1, absmax2))
        ):
            adamw_step8(
                [p.detach()], [g], [state1], [state2], [absmax1], [absmax2], step=step, lr=lr, beta1=beta1, beta2=beta2,
                eps=eps, weight_decay=weight_decay, grad_factor=gnorm_scale,
            )  # fmt: skip
            return
        original(
            optimizer_name, g, p, state1, state2, beta1, beta2, beta3, alpha, eps, step, lr, qmap1, qmap2, absmax1, absmax2,
            weight_decay, gnorm_scale, skip_zeros,
        )  # fmt: skip

    return update


def fits(p: Tensor, g: Tensor, *states: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the step can take them as they lie."""
    return (
        p.dtype in NATIVE_DTYPE
        and g.dtype == p.dtype
        and all(s is not None and s.dtype == dtype for s in states)
        and all(t.shape == p.shape and t.is_contiguous() for t in (p, g, *states))
    )
