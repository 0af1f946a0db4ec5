"""dx = dy W, dbias = sum of dy over the rows. Saves nothing but the weight's own tensors."""

import torch


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias):
        ctx.save_for_backward(packed, absmax, absmax_scale, absmax_offset)
        ctx.k, ctx.block_size, ctx.quant_type = x.shape[-1], block_size, quant_type
        arguments = (packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.peftk.nf4_linear(x, *arguments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.peftk.nf4_linear_dx(dy, *ctx.saved_tensors, ctx.k, ctx.block_size, ctx.quant_type)
        if ctx.needs_input_grad[8]:
            dbias = sum_rows(dy)
        return dx, None, None, None, None, None, None, None, dbias


def sum_rows(dy: torch.Tensor) -> torch.Tensor:
    """(..., n) -> (n,), summed in fp32 at least."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    return dy.reshape(-1, dy.shape[-1]).sum(0, dtype=wide).to(dy.dtype)


class _NF4LinearMany(torch.autograd.Function):
    """weights: (packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type), a list each. An output that the loss
    doesn't use takes no part in the backward pass."""

    @staticmethod
    def forward(ctx, x, weights, *bias):
        with torch._C._AutoDispatchBelowAutograd():
            ys = torch.ops.peftk.nf4_linear_many(x, *weights, list(bias))
        ctx.save_for_backward(*[part for parts in weights[:4] for part in parts])
        ctx.k, ctx.formats = x.shape[-1], weights[5:]
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dys):
        used = [i for i, dy in enumerate(dys) if dy is not None]
        pick = lambda values: [values[i] for i in used]  # noqa: E731
        dx, saved = None, ctx.saved_tensors
        if used and ctx.needs_input_grad[0]:
            parts = (pick(saved[at : at + len(dys)]) for at in range(0, len(saved), len(dys)))
            dx = torch.ops.peftk.nf4_linear_many_dx(pick(dys), *parts, ctx.k, *map(pick, ctx.formats))
        needs = ctx.needs_input_grad[2:]
        return dx, None, *[sum_rows(dy) if need and dy is not None else None for dy, need in zip(dys, needs, strict=True)]


def nf4_linear(x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias):
    """The Autograd kernel: with no gradient wanted it costs no autograd.Function."""
    arguments = (x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias)
    if wants_gradient(x, bias):
        return _NF4Linear.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.peftk.nf4_linear(*arguments)


def nf4_linear_many(x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias):
    """The same for a list of weights."""
    weights = (packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type)
    if wants_gradient(x, *bias):
        return list(_NF4LinearMany.apply(x, weights, *bias))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.peftk.nf4_linear_many(x, *weights, bias)


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
