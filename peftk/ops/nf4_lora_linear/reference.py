"""The definition, in fp32 (fp64 for fp64), W decoded whole. lora_linear's is the same with a W that need not be decoded."""

import torch

from peftk.ops import dispatch
from peftk.ops.dispatch import Implementation, no_reason
from peftk.ops.nf4_linear.reference import dense


def _dropped(z: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    if dropout == 0:
        return z
    with dispatch.use("reference"):
        return torch.ops.peftk.philox_dropout(z, dropout, seed)


def low_rank(x, w, A, B, bias, z, scale, dropout, seed) -> tuple[torch.Tensor, torch.Tensor]:
    """y and S; w (n, k) in the dtype of the computation."""
    wide = w.dtype
    s = _dropped((x if z is None else z).to(wide), dropout, seed) @ A.to(wide).T
    y = x.to(wide) @ w.T + scale * (s @ B.to(wide).T)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype), s.to(x.dtype)


def low_rank_backward(
    dy, x, z, s, w, A, B, scale, dropout, seed, need_dz
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dz, dA, dB; w None: no dx is wanted."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    n, k, source = dy.shape[-1], x.shape[-1], x if z is None else z
    dy2, dropped = dy.to(wide).reshape(-1, n), _dropped(source.to(wide), dropout, seed).reshape(-1, k)
    t = scale * (dy2 @ B.to(wide))
    dz = _dropped((t @ A.to(wide)).view(x.shape), dropout, seed)
    dx = dy.new_empty(0)
    if w is not None:
        dx = (dy2 @ w).view(x.shape)
        dx = (dx + dz if z is None else dx).to(x.dtype)
    dA, dB = t.T @ dropped, scale * (dy2.T @ s.to(wide).reshape(-1, s.shape[-1]))
    return dx, dz.to(source.dtype) if need_dz else dy.new_empty(0), dA.to(A.dtype), dB.to(B.dtype)


def run(
    x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, scale, block_size, quant_type, dropout, seed
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    w = dense(packed, absmax, absmax_scale, absmax_offset, B.shape[0], x.shape[-1], block_size, quant_type, wide)
    return low_rank(x, w, A, B, bias, z, scale, dropout, seed)


def run_backward(
    dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, scale, block_size, quant_type, dropout, seed,
    need_dx, need_dz,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    wide, w = torch.promote_types(dy.dtype, torch.float32), None
    if need_dx:
        w = dense(packed, absmax, absmax_scale, absmax_offset, dy.shape[-1], x.shape[-1], block_size, quant_type, wide)
    return low_rank_backward(dy, x, z, s, w, A, B, scale, dropout, seed, need_dz)


def run_many(
    x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, scale, block_size, quant_type, dropout, seed
) -> list[torch.Tensor]:
    weights = zip(packed, absmax, absmax_scale, absmax_offset, A, B, bias, scale, block_size, quant_type, seed, strict=True)
    ys, kept = zip(*(run(x, *w[:7], z, *w[7:10], dropout, w[10]) for w in weights), strict=True)
    return [*ys, *kept]


def run_many_backward(
    dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, scale, block_size, quant_type, dropout, seed,
    need_dx, need_dz,
) -> list[torch.Tensor]:  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    inputs = (x.to(wide), z if z is None else z.to(wide))
    weights = zip(dy, s, packed, absmax, absmax_scale, absmax_offset, A, B, scale, block_size, quant_type, seed, strict=True)
    dxs, dzs, dAs, dBs = zip(
        *(run_backward(w[0].to(wide), *inputs, *w[1:11], dropout, w[11], need_dx, need_dz) for w in weights), strict=True
    )
    return [sum(dxs).to(x.dtype), sum(dzs).to(x.dtype), *dAs, *dBs]


FORWARD = Implementation("reference", run, no_reason)
BACKWARD = Implementation("reference", run_backward, no_reason)
MANY = Implementation("reference", run_many, no_reason)
MANY_BACKWARD = Implementation("reference", run_many_backward, no_reason)
