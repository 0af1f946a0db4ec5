"""Saves x (or z as well), every S and the weight's own tensors; the formulas stand in the op's contract."""

import torch

from peftk.ops.nf4_linear.autograd import sum_rows, wants_gradient


class _NF4LoraLinearRows(torch.autograd.Function):
    """factors: every A, then every B."""

    @staticmethod
    def forward(ctx, x, z, bias, weight, facts, *factors):
        A, B = list(factors[: len(factors) // 2]), list(factors[len(factors) // 2 :])
        with torch._C._AutoDispatchBelowAutograd():
            y, *s = torch.ops.peftk.nf4_lora_linear_rows_forward(x, *weight, A, B, bias, z, *facts)
        ctx.save_for_backward(x if z is None else None, z, *weight, *s, *A, *B)
        ctx.facts = facts
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, z, *saved = ctx.saved_tensors
        weight, count = saved[:4], (len(saved) - 4) // 3
        s, A, B = (saved[at : at + count] for at in range(4, len(saved), count)) if count else ([], [], [])
        need_dx, need_dz, need_bias = ctx.needs_input_grad[:3]
        dx, dz, *factors = torch.ops.peftk.nf4_lora_linear_rows_backward(
            dy, z if x is None else x, z, s, *weight, A, B, *ctx.facts, need_dx, need_dz
        )
        dbias = sum_rows(dy) if need_bias else None
        return dx if need_dx else None, dz if need_dz else None, dbias, None, None, *factors


def nf4_lora_linear_rows(x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, *facts):
    """The Autograd kernel: with no gradient wanted it costs no autograd.Function."""
    weight = (packed, absmax, absmax_scale, absmax_offset)
    if wants_gradient(x, z, bias, *A, *B):
        return _NF4LoraLinearRows.apply(x, z, bias, weight, facts, *A, *B)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.peftk.nf4_lora_linear_rows(x, *weight, A, B, bias, z, *facts)
