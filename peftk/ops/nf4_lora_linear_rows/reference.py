"""The definition, in fp32 (fp64 for fp64), W decoded whole, an adapter after the other."""

import torch

from peftk.ops.dispatch import Implementation, no_reason
from peftk.ops.nf4_linear.reference import dense
from peftk.ops.nf4_lora_linear_rows.groups import rows_by_adapter


def _rows(index, x, adapters) -> list[torch.Tensor]:
    return [torch.tensor(rows, dtype=torch.int64, device=x.device) for rows in rows_by_adapter(index, x, adapters)]


def run(
    x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, index, scale, n, block_size, quant_type
) -> list[torch.Tensor]:
    wide, k = torch.promote_types(x.dtype, torch.float32), x.shape[-1]
    w = dense(packed, absmax, absmax_scale, absmax_offset, n, k, block_size, quant_type, wide)
    y, source, kept = x.to(wide).reshape(-1, k) @ w.T, (x if z is None else z).to(wide).reshape(-1, k), []
    for a, b, factor, rows in zip(A, B, scale, _rows(index, x, len(A)), strict=True):
        s = source[rows] @ a.to(wide).T
        y.index_add_(0, rows, factor * (s @ b.to(wide).T))
        kept.append(s.to(x.dtype))
    y = y if bias is None else y + bias.to(wide)
    return [y.to(x.dtype).view(*x.shape[:-1], n), *kept]


def run_backward(
    dy, x, z, s, packed, absmax, absmax_scale, absmax_offset, A, B, index, scale, n, block_size, quant_type, need_dx, need_dz
) -> list[torch.Tensor]:
    wide, k = torch.promote_types(dy.dtype, torch.float32), x.shape[-1]
    dy2, source = dy.to(wide).reshape(-1, n), (x if z is None else z).to(wide).reshape(-1, k)
    dz, dA, dB = torch.zeros_like(source), [], []
    for a, b, si, factor, rows in zip(A, B, s, scale, _rows(index, x, len(A)), strict=True):
        t = factor * (dy2[rows] @ b.to(wide))
        dz.index_add_(0, rows, t @ a.to(wide))
        dA.append((t.T @ source[rows]).to(a.dtype))
        dB.append((factor * (dy2[rows].T @ si.to(wide))).to(b.dtype))
    dx = x.new_empty(0)
    if need_dx:
        dx = dy2 @ dense(packed, absmax, absmax_scale, absmax_offset, n, k, block_size, quant_type, wide)
        dx = (dx + dz if z is None else dx).to(x.dtype).view(x.shape)
    return [dx, dz.to(x.dtype).view(x.shape) if need_dz else x.new_empty(0), *dA, *dB]


FORWARD = Implementation("reference", run, no_reason)
BACKWARD = Implementation("reference", run_backward, no_reason)
