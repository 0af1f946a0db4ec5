"""The definition, in fp32."""

import torch

from peftk.format.code4 import values4
from peftk.format.dynamic8 import NESTED_BLOCK, values8
from peftk.ops.dispatch import Implementation, no_reason


def scales(absmax: torch.Tensor, absmax_scale: torch.Tensor | None, absmax_offset: torch.Tensor | None) -> torch.Tensor:
    """The constant of each block, (blocks,) fp32; two roundings where it is double quantised."""
    if absmax_scale is None:
        return absmax
    values = values8(True, absmax.device)[absmax.int()]
    return values * absmax_scale.repeat_interleave(NESTED_BLOCK)[: absmax.numel()] + absmax_offset


def run(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    absmax_scale: torch.Tensor | None,
    absmax_offset: torch.Tensor | None,
    block_size: int,
    quant_type: str,
    out: torch.Tensor,
) -> None:
    packed, count = packed.reshape(-1), out.numel()
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1)[:count]
    scale = scales(absmax, absmax_scale, absmax_offset).repeat_interleave(block_size)[:count]
    out.copy_((values4(quant_type, packed.device)[codes.int()] * scale + 0.0).view(out.shape))


IMPLEMENTATION = Implementation("reference", run, no_reason)
