"""The definition: both operands rounded and written out, a product in fp32 (fp64 for fp64)."""

import torch
from torch.nn.functional import pad

from peftk.format.code4 import code4, values4
from peftk.ops.dispatch import Implementation, no_reason
from peftk.ops.nf4_dequantize.reference import scales

RUN = 64  # neighbours along k that share a scale
FLOOR = 2.0**-100  # of max|x|; below it a run counts as zero


def round_rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., k) rounded to 8 bits, in its own units."""
    k = x.shape[-1]
    runs = pad(x, (0, -k % RUN)).unflatten(-1, (-1, RUN))
    most = runs.abs().amax(-1, keepdim=True)
    scale = torch.where(most < FLOOR, 0.0, most / 127)
    scale = torch.where(most.isfinite(), scale, float("nan"))
    q = torch.where(scale == 0, 0.0, (runs / scale).round())
    return (q * scale).flatten(-2)[..., :k]


def run(x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias) -> torch.Tensor:
    wide, k = torch.promote_types(x.dtype, torch.float32), x.shape[-1]
    packed = packed.reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1)[: n * k]
    constants = scales(absmax, absmax_scale, absmax_offset).to(wide).repeat_interleave(block_size)[: n * k]
    scale = code4(quant_type).int8_scale
    table = (scale * values4(quant_type, packed.device)).round().to(wide)
    w = (table[codes.int()] * (constants / scale)).view(n, k)
    y = round_rows(x.to(wide)) @ w.T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


IMPLEMENTATION = Implementation("reference", run, no_reason)
