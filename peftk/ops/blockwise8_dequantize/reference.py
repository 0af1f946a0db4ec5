"""The definition, in fp32."""

import torch

from peftk.format.dynamic8 import values8
from peftk.ops.dispatch import Implementation, no_reason


def run(codes: torch.Tensor, absmax: torch.Tensor, block_size: int, signed: bool, dtype: torch.dtype) -> torch.Tensor:
    scale = absmax.repeat_interleave(block_size)[: codes.numel()]
    values = values8(signed, codes.device)[codes.reshape(-1).int()] * scale + 0.0
    return values.to(dtype).reshape(codes.shape)


IMPLEMENTATION = Implementation("reference", run, no_reason)
