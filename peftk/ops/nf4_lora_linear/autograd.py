"""Saves x (or z as well), S and the weight's own tensors; the formulas stand in the op's contract."""

import torch

from peftk.ops.nf4_linear.autograd import sum_rows, wants_gradient


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


class _NF4LoraLinearMany(torch.autograd.Function):
    """weights: (packed, absmax, absmax_scale, absmax_offset), facts: (scale, block_size, quant_type, dropout, seed), a list of
    each but dropout; leaves: every A, every B, every bias. An output that the loss doesn't use takes no part in the backward
    pass."""

    @staticmethod
    def forward(ctx, x, z, weights, facts, *leaves):
        count = len(weights[0])
        A, B, bias = (list(leaves[at : at + count]) for at in range(0, 3 * count, count))
        with torch._C._AutoDispatchBelowAutograd():
            results = torch.ops.peftk.nf4_lora_linear_many_forward(x, *weights, A, B, bias, z, *facts)
        kept = (results[count:], *weights, A, B)
        ctx.save_for_backward(x if z is None else None, z, *[part for parts in kept for part in parts])
        ctx.facts = facts
        ctx.set_materialize_grads(False)
        return tuple(results[:count])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dys):
        count, used = len(dys), [i for i, dy in enumerate(dys) if dy is not None]
        grads = [None] * 3 * count
        if not used:
            return None, None, None, None, *grads
        pick = lambda values: [values[i] for i in used]  # noqa: E731
        x, z, *saved = ctx.saved_tensors
        s, *weights = (pick(saved[at : at + count]) for at in range(0, len(saved), count))
        need_dx, need_dz = ctx.needs_input_grad[:2]
        scale, block_size, quant_type, dropout, seed = ctx.facts
        facts = (pick(scale), pick(block_size), pick(quant_type), dropout, pick(seed))
        dx, dz, *factors = torch.ops.peftk.nf4_lora_linear_many_backward(
            pick(dys), z if x is None else x, z, s, *weights, *facts, need_dx, need_dz
        )
        for at, i in enumerate(used):
            grads[i], grads[count + i] = factors[at], factors[len(used) + at]
            if ctx.needs_input_grad[4 + 2 * count + i]:
                grads[2 * count + i] = sum_rows(dys[i])
        return dx if need_dx else None, dz if need_dz else None, None, None, *grads


def nf4_lora_linear(x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, *facts):
    """The Autograd kernel: with no gradient wanted it costs no autograd.Function."""
    arguments = (x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, *facts)
    if wants_gradient(x, A, B, bias, z):
        return _NF4LoraLinear.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.peftk.nf4_lora_linear(*arguments)


def nf4_lora_linear_many(x, packed, absmax, absmax_scale, absmax_offset, A, B, bias, z, *facts):
    """The same for a list of weights."""
    weights = (packed, absmax, absmax_scale, absmax_offset)
    if wants_gradient(x, z, *A, *B, *bias):
        return list(_NF4LoraLinearMany.apply(x, z, weights, facts, *A, *B, *bias))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.peftk.nf4_lora_linear_many(x, *weights, A, B, bias, z, *facts)
