"""How A (r, k) and B (n, r) of a linear layer start.

Drawn, with the product B A zero (but for ``False``): Kaiming (Hu et al. 2021, section 4.1), Gaussian, orthogonal (rows of B and A
from the two halves of one orthogonal matrix, so that B A is zero with neither factor zero).
Taken out of W, so that the base layer keeps the rest: PiSSA (Meng et al. 2024, equations 2 to 4) the r largest singular values;
OLoRA (Büyükakyüz 2024) the first r columns of a QR decomposition; LoftQ (Li et al. 2023, algorithm 1) what a 4-bit weight lacks.
EVA starts as Kaiming does until ``peftk.eva_init`` has seen data.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftk.format.nf4 import NF4Weight
from peftk.ops import quantize_nf4

if TYPE_CHECKING:
    from peftk.methods.lora import LoraConfig

logger = logging.getLogger("peftk")
OVERSAMPLING = 8


@dataclass
class Start:
    """Factors taken out of W: the base layer keeps W - s B A, or, where given, ``w4``, which B and A were fitted to."""

    A: torch.Tensor
    B: torch.Tensor
    w4: NF4Weight | None = None


def draw(kind: bool | str, n: int, k: int, r: int, **facts: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, k) and B (n, r) by a config's ``init_lora_weights``; those that need W or data are Kaiming's here."""
    if kind == "orthogonal":
        return _orthogonal(n, k, r, **facts)
    A, B = torch.zeros(r, k, **facts), torch.zeros(n, r, **facts)
    if kind == "gaussian":
        nn.init.normal_(A, std=1 / r)
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if kind is False:
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    return A, B


def _orthogonal(n: int, k: int, r: int, **facts: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Odd rows of an orthogonal (r, r) matrix span A's rows, even ones B's. The scale 1/10 is HF peft's."""
    q = torch.linalg.qr(torch.randn(r, r, **facts))[0]
    return q[0::2].T @ torch.randn(r // 2, k, **facts) / 10, torch.randn(n, r // 2, **facts) @ q[1::2] / 10


def pissa(w: torch.Tensor, r: int, scaling: float, config: LoraConfig) -> Start:
    """W (n, k) ~ U S V^T: B = U sqrt(S / s), A = sqrt(S / s) V^T. ``pissa_niter_N``: by N subspace iterations, much faster, in
    a space that is a little larger than r (Halko et al. 2009, section 4.2), without which it misses part of the last values."""
    iterations = niter(config.init_lora_weights)
    if iterations is None:
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(w, min(r + OVERSAMPLING, *w.shape), iterations)
        vt = v.T
    return Start(*_split(u, s, vt, r, scaling))


def niter(kind: bool | str) -> int | None:
    """N of "pissa_niter_N", None for anything else."""
    number = str(kind).removeprefix("pissa_niter_")
    return int(number) if number != str(kind) and number.isdigit() else None


def olora(w: torch.Tensor, r: int, scaling: float, config: LoraConfig) -> Start:
    """W (n, k) = Q R: B = Q[:, :r], A = R[:r]."""
    q, upper = torch.linalg.qr(w)
    return Start(upper[:r].contiguous(), q[:, :r].contiguous())


def loftq(w: torch.Tensor, r: int, scaling: float, config: LoraConfig) -> Start:
    """Alternate Q = quantised(W - s B A) and s B A = the rank-r part of W - Q, ``loftq_iter`` times, and keep the best.

    ValueError, with the errors ||W - Q - s B A|| / ||W||, where none is below that of plain quantisation.
    """
    wanted, best, errors = config.loftq_config, None, []
    low_rank, norm = torch.zeros_like(w), torch.linalg.norm(w).clamp_min(torch.finfo(w.dtype).tiny)
    for step in range(wanted.loftq_iter):
        w4 = quantize_nf4(w - low_rank, wanted.block_size, wanted.double_quant)
        rest = w - w4.dequantize(w.dtype)
        if step == 0:
            errors.append((torch.linalg.norm(rest) / norm).item())
        A, B = _split(*torch.linalg.svd(rest, full_matrices=False), r, scaling)
        low_rank = scaling * (B @ A)
        errors.append((torch.linalg.norm(rest - low_rank) / norm).item())
        if errors[-1] < min(errors[:-1]):
            best = Start(A, B, w4)
    told = ", ".join(f"{error:.3g}" for error in errors)
    if best is None:
        raise ValueError(f"loftq: expected an error below plain quantisation's, got, by iteration from plain on, {told}")
    logger.debug("loftq: relative error by iteration, from plain quantisation on: %s", told)
    return best


def _split(u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor, r: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) with scaling * B A = the first r of u s vt, the singular values shared evenly."""
    root = (s[:r] / scaling).sqrt()
    return (root[:, None] * vt[:r]).contiguous(), (u[:, :r] * root).contiguous()


# By a config's init_lora_weights, without "_niter_N": W (n, k) fp32, r, the scaling, the config -> Start.
TAKEN_FROM_W: dict[str, Callable[[torch.Tensor, int, float, Any], Start]] = {"pissa": pissa, "olora": olora, "loftq": loftq}
DRAWN = (True, False, "gaussian", "orthogonal", "eva")


def family(kind: bool | str) -> bool | str:
    """The name in TAKEN_FROM_W or DRAWN that ``kind`` goes by."""
    return "pissa" if niter(kind) is not None else kind


@torch.no_grad()
def start_of(path: str, w: torch.Tensor, r: int, scaling: float, config: LoraConfig) -> Start:
    """The start that the config takes out of W (n, k). ValueError names the layer where W isn't finite or r is too large."""
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    if r > min(w.shape):
        raise ValueError(f"{path}: r: expected at most {min(w.shape)} for a weight {tuple(w.shape)} that is decomposed, got {r}")
    if not torch.isfinite(w).all():
        raise ValueError(f"{path}: expected a finite weight to start from, got NaN or Inf")
    if scaling <= 0:
        raise ValueError(f"{path}: expected a positive scaling to decompose a weight, got {scaling}")
    try:
        return TAKEN_FROM_W[family(config.init_lora_weights)](w, r, scaling, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
