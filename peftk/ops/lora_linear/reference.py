"""The definition, in fp32 (fp64 for fp64)."""

import torch

from peftk.ops.dispatch import Implementation, no_reason
from peftk.ops.nf4_lora_linear.reference import low_rank, low_rank_backward


def run(x, weight, A, B, bias, z, scale, dropout, seed) -> tuple[torch.Tensor, torch.Tensor]:
    return low_rank(x, weight.to(torch.promote_types(x.dtype, torch.float32)), A, B, bias, z, scale, dropout, seed)


def run_backward(
    dy, x, z, s, weight, A, B, scale, dropout, seed, need_dx, need_dz
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(dy.dtype, torch.float32)
    w = weight.to(wide) if need_dx else None
    return low_rank_backward(dy, x, z, s, w, A, B, scale, dropout, seed, need_dz)


FORWARD = Implementation("reference", run, no_reason)
BACKWARD = Implementation("reference", run_backward, no_reason)
