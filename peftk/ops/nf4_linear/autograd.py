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


def nf4_linear(x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias):
    """The Autograd kernel: with no gradient wanted it costs no autograd.Function."""
    arguments = (x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _NF4Linear.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.peftk.nf4_linear(*arguments)
