"""philox_dropout: y[i] = x[i] / (1 - p) where word i % 4 of Philox4x32-10(counter i / 4, key seed) >= p * 2^32, else 0.

The mask is a function of (seed, flat index): the same on every backend, made again in the backward pass, never stored.
(Srivastava et al. 2014; Salmon et al. 2011.)
"""

from __future__ import annotations

import torch

from peftk.ops import dispatch, gpu, library
from peftk.ops.philox_dropout import cpu, cuda, reference


def _against_triton(x: torch.Tensor, p: float, seed: int) -> list[str]:
    return gpu.triton().reasons_against(x) + dispatch.reasons_against_dtype("x", x.dtype)


TABLE = (
    cpu.IMPLEMENTATION,
    cuda.IMPLEMENTATION,
    gpu.triton_implementation("philox_dropout", _against_triton),
    reference.IMPLEMENTATION,
)


def philox_dropout(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """x (any shape) -> (x.shape) x.dtype; a fresh tensor. p in [0, 1), seed in [0, 2^63). Differentiable in x. ValueError for a
    p or seed outside."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p: expected a probability in [0, 1), got {p}")
    if not torch.compiler.is_compiling() and not 0 <= seed < 2**63:  # a trace knows no value of a seed that is drawn in it
        raise ValueError(f"seed: expected an integer in [0, 2^63), got {seed}")
    return torch.ops.peftk.philox_dropout(x, p, seed)


def draw_seed() -> int:
    """A seed from torch's global generator, so that torch.manual_seed and gradient checkpointing's saved state repeat it."""
    return int(torch.randint(2**63 - 1, ()))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, seed):
        ctx.p, ctx.seed = p, seed
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.peftk.philox_dropout(x, p, seed)

    @staticmethod
    def backward(ctx, dy):
        return torch.ops.peftk.philox_dropout(dy, ctx.p, ctx.seed), None, None


def _run(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    return dispatch.select("philox_dropout", TABLE, x, p, seed)(x, p, seed)


library.define(
    "philox_dropout(Tensor x, float p, SymInt seed) -> Tensor",
    _run,
    lambda x, p, seed: x.new_empty(x.shape),
    _Dropout.apply,
)
