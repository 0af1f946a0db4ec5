"""Saves x (or z as well), S and the weight's own tensors; the formulas stand in the op's contract."""

import torch

from peftk.ops.nf4_linear.autograd import sum_rows


class _NF4LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, scale, block_size, quant_type, dropout, seed):
        weight, facts = (packed, absmax, absmax_scale, absmax_offset, A, B), (scale, block_size, quant_type, dropout, seed)
        with torch._C._AutoDispatchBelowAutograd():
            y, s = torch.ops.peftk.nf4_lora_linear_forward(x, *weight, bias, z, *facts)
        ctx.save_for_backward(x if z is None else None, z, s, *weight)
        ctx.facts = facts
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, z, s, *weight = ctx.saved_tensors
        need_dx, need_dz = ctx.needs_input_grad[0], ctx.needs_input_grad[8]
        dx, dz, dA, dB = torch.ops.peftk.nf4_lora_linear_backward(
            dy, z if x is None else x, z, s, *weight, *ctx.facts, need_dx, need_dz
        )
        dbias = sum_rows(dy) if ctx.needs_input_grad[7] else None
        return (dx if need_dx else None, None, None, None, None, dA, dB, dbias, dz if need_dz else None, *[None] * 5)


def nf4_lora_linear(x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, *facts):
    """The Autograd kernel: with no gradient wanted it costs no autograd.Function."""
    arguments = (x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, *facts)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, A, B, bias, z)):
        return _NF4LoraLinear.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.peftk.nf4_lora_linear(*arguments)
