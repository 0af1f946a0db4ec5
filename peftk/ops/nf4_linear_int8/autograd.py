"""Rounding has no gradient: where one is wanted, the exact op runs instead."""

import torch


def nf4_linear_int8(x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias):
    arguments = (x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return torch.ops.peftk.nf4_linear(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.peftk.nf4_linear_int8(*arguments)
