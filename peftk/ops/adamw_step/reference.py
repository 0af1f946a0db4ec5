"""The definition: every operation rounds on its own, in fp32, or in fp64 for fp64 parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftk.format.dynamic8 import STATE_BLOCK, thresholds8, values8, zero_code8
from peftk.ops.adamw_step.coefficients import Coefficients
from peftk.ops.dispatch import Implementation, no_reason

Tensors = Sequence[torch.Tensor]


def update(
    param: torch.Tensor, grad: torch.Tensor, m: torch.Tensor, v: torch.Tensor, c: Coefficients
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The new parameter in m's dtype, and the new moments."""
    g = grad.to(m.dtype) * c.grad_factor
    m = m + (g - m) * c.weight1
    v = v * c.beta2 + (g * c.weight2) * g
    denominator = square_root(v) * c.root_factor + c.eps
    return param.to(m.dtype) * c.decay - (m * c.step_size) / denominator, m, v


def square_root(v: torch.Tensor) -> torch.Tensor:
    """Correctly rounded, by way of fp64: torch's own on a CPU, MKL's, is now and then one ulp off."""
    return v.double().sqrt().to(v.dtype)


def run(params: Tensors, grads: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, coefficients: Sequence[float]) -> None:
    for p, g, m, v in zip(params, grads, exp_avg, exp_avg_sq, strict=True):
        for old, new in zip((p, m, v), update(p, g, m, v, Coefficients(*coefficients)), strict=True):
            old.copy_(new)


def run8(
    params: Tensors,
    grads: Tensors,
    state1: Tensors,
    state2: Tensors,
    absmax1: Tensors,
    absmax2: Tensors,
    coefficients: Sequence[float],
) -> None:
    for p, g, codes1, codes2, scale1, scale2 in zip(params, grads, state1, state2, absmax1, absmax2, strict=True):
        m, v = decoded(codes1, scale1, signed=True), decoded(codes2, scale2, signed=False)
        new, m, v = update(p, g, m, v, Coefficients(*coefficients))
        p.copy_(new)
        encode(m, codes1, scale1, signed=True)
        encode(v, codes2, scale2, signed=False)


def decoded(codes: torch.Tensor, absmax: torch.Tensor, signed: bool) -> torch.Tensor:
    """(codes.shape) fp32"""
    scale = absmax.repeat_interleave(STATE_BLOCK)[: codes.numel()]
    return values8(signed, codes.device)[codes.long()] * scale.view(codes.shape)


def encode(x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, signed: bool) -> None:
    """Write the codes nearest to x and their blocks' absmax. Blocks with nothing above the denormals are zeros: 1 / absmax may
    be infinite there, and zeros of a block must stay zeros."""
    if not x.numel():
        return
    padding = -x.numel() % STATE_BLOCK
    blocks = torch.nn.functional.pad(x.reshape(-1), (0, padding)).view(-1, STATE_BLOCK)
    biggest = blocks.abs().amax(1)
    absmax.copy_(torch.where(biggest < torch.finfo(torch.float32).tiny, 0.0, biggest))
    scaled = blocks * (1 / absmax)[:, None]
    nearest = torch.bucketize(scaled, thresholds8(signed, x.device), out_int32=True).to(torch.uint8)
    nearest[scaled.isnan()] = 0
    nearest[absmax == 0] = zero_code8(signed)
    codes.copy_(nearest.view(-1)[: x.numel()].view(codes.shape))


IMPLEMENTATION = Implementation("reference", run, no_reason)
IMPLEMENTATION8 = Implementation("reference", run8, no_reason)
