"""The definition, in fp32."""

import torch

from peftk.format.dynamic8 import thresholds8, zero_code8
from peftk.ops.dispatch import Implementation, no_reason


def run(x: torch.Tensor, block_size: int, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    count = x.numel()
    padding = -count % block_size
    blocks = torch.nn.functional.pad(x.reshape(-1).float(), (0, padding)).view(-1, block_size)
    absmax = blocks.abs().amax(1) if count else blocks.new_empty(0)
    scaled = blocks * (1 / absmax)[:, None]
    codes = torch.bucketize(scaled, thresholds8(signed, x.device), out_int32=True).to(torch.uint8)
    codes[scaled.isnan()] = 0
    codes[absmax == 0] = zero_code8(signed)
    return codes.view(-1)[:count].reshape(x.shape), absmax


IMPLEMENTATION = Implementation("reference", run, no_reason)
