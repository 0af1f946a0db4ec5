"""The definition, in fp32."""

import torch

from peftk.format.code4 import code4
from peftk.ops.dispatch import Implementation, no_reason


def run(w: torch.Tensor, block_size: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    code, count = code4(quant_type), w.numel()
    blocks = torch.nn.functional.pad(w.reshape(-1).float(), (0, -count % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1) if count else blocks.new_empty(0)
    scaled = blocks * (1 / absmax)[:, None]
    rank = torch.zeros_like(scaled, dtype=torch.uint8)
    for threshold in code.thresholds:
        rank += scaled > threshold
    codes = torch.tensor(code.code_of_rank, dtype=torch.uint8, device=w.device)[rank.int()]
    codes[absmax == 0] = code.code_of_zero
    flat = codes.view(-1)[: count + count % 2]
    if count % 2:
        if flat.numel() > count:
            flat[-1] = code.code_of_zero
        else:
            flat = torch.cat([flat, flat.new_tensor([code.code_of_zero])])
    return flat[::2] << 4 | flat[1::2], absmax


IMPLEMENTATION = Implementation("reference", run, no_reason)
