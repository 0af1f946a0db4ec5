"""``bitsandbytes.matmul_4bit``: the forward and backward pass of Linear4bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from peftk.format.code4 import CODES4
from peftk.integrations.bitsandbytes.regime import dense_dtypes, is_dense
from peftk.integrations.bitsandbytes.weights import as_bytes, forget, restore_layout, weight_of
from peftk.ops import nf4_linear

Matmul = Callable[..., torch.Tensor]


def instead_of(original: Matmul) -> Matmul:
    """matmul_4bit with peftk's product on a CPU, and bitsandbytes' own elsewhere: on other devices, and where decoding first is
    faster (its decoder is ours then)."""
    dense = dense_dtypes()

    def matmul_4bit(
        A: torch.Tensor,
        B: torch.Tensor,
        quant_state: Any,
        out: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not is_ours(A, B, quant_state) or is_dense(A, dense):
            return original(A, B, quant_state, out=out, bias=bias)
        y = product(A, B, quant_state, bias)
        return y if out is None else out.copy_(y)

    return matmul_4bit


def is_ours(x: torch.Tensor, packed: torch.Tensor, state: Any) -> bool:
    """Whether it is x (..., k) times a 4-bit W (n, k), on a CPU; not, say, the W (k, n) of old checkpoints. A weight that was
    repacked before peftk took over is as it was then, for whoever multiplies."""
    if state is None or not x.is_cpu:
        forget(state)
        return False
    if getattr(state, "packing_format_for_cpu", False):
        restore_layout(packed, state)
    shape = state.shape
    return len(shape) == 2 and x.dim() > 0 and x.shape[-1] == shape[1] and state.quant_type in CODES4


def product(x: torch.Tensor, packed: torch.Tensor, state: Any, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias, differentiable in x and bias."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        bias = bias if bias is None else bias.to(x.dtype)
        parts = as_bytes(packed), *traced_constants(state)
        return torch.ops.peftk.nf4_linear(x, *parts, state.shape[0], state.blocksize, state.quant_type, bias)
    return nf4_linear(x, weight_of(packed, state), bias)


def traced_constants(state: Any) -> tuple[torch.Tensor, None, None]:
    """absmax as a trace can have it: whether a nested table is the kernels' own can't be asked of a tensor without values."""
    if state.state2 is None:
        return state.absmax, None, None
    nested = state.state2
    decoded = torch.ops.bitsandbytes.dequantize_blockwise(
        state.absmax, nested.absmax, nested.code, nested.blocksize, torch.float32
    )
    return decoded + state.offset, None, None
