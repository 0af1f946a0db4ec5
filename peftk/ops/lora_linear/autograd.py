"""Saves x (or z, or both where W is trained) and S; the formulas stand in the op's contract."""

import torch

from peftk.ops.nf4_linear.autograd import sum_rows


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, A, B, bias, z, *facts):
        with torch._C._AutoDispatchBelowAutograd():
            y, s = torch.ops.peftk.lora_linear_forward(x, weight, A, B, bias, z, *facts)
        ctx.save_for_backward(x if z is None or ctx.needs_input_grad[1] else None, z, s, weight, A, B)
        ctx.facts = facts
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, z, s, *weight = ctx.saved_tensors
        need_dx, need_dw, _, _, need_dbias, need_dz = ctx.needs_input_grad[:6]
        dx, dz, dA, dB = torch.ops.peftk.lora_linear_backward(
            dy, z if x is None else x, z, s, *weight, *ctx.facts, need_dx, need_dz
        )
        dw = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1]) if need_dw else None
        dbias = sum_rows(dy) if need_dbias else None
        return (dx if need_dx else None, dw, dA, dB, dbias, dz if need_dz else None, None, None, None)


def lora_linear(x, weight, A, B, bias, z, *facts):
    """The Autograd kernel: with no gradient wanted it costs no autograd.Function."""
    tensors = (x, weight, A, B, bias, z)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _LoraLinear.apply(*tensors, *facts)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.peftk.lora_linear(*tensors, *facts)
