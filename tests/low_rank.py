"""What the tests of nf4_lora_linear and lora_linear share: shapes, the plain composition, and a comparison with fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from numerics import assert_no_worse_than_twice_plain

import peftk
from peftk.ops import philox_dropout

# m, k, n, r: every value at least once.
SHAPES = [
    (1, 64, 16, 8),
    (3, 80, 48, 1),
    (16, 96, 130, 16),
    (17, 33, 15, 64),
    (65, 128, 49, 8),
    (130, 576, 64, 16),
    (0, 64, 8, 2),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE, SEED = 0.5, 11


Order = Sequence[torch.Tensor]  # permutations of m, n, k and r


def orders(*sizes: int) -> list[Order]:
    """As it is, and two others."""
    generator = torch.Generator().manual_seed(0)
    return [[torch.arange(size) for size in sizes], *([torch.randperm(s, generator=generator) for s in sizes] for _ in range(2))]


def lora(x, w, A, B, bias, z, dropout, order: Order):
    """The plain composition in the tensors' own dtype, every sum in that order; autograd gives its gradients."""
    branch = x if z is None else z
    branch = philox_dropout(branch, dropout, SEED) if dropout else branch
    m, n, k, r = order
    y = torch.nn.functional.linear(x[m][:, k], w[n][:, k], bias[n])
    low = torch.nn.functional.linear(branch[m][:, k], A[r][:, k])
    return (y + SCALE * torch.nn.functional.linear(low, B[n][:, r]))[m.argsort()][:, n.argsort()]


def assert_forward_and_gradients(
    op: Callable[..., torch.Tensor], w: torch.Tensor, m: int, r: int, dtype: torch.dtype, dropout: float, with_z: bool
) -> None:
    """op(x, A, B, bias, z) with SCALE and SEED against lora with w (n, k): y and the gradients of all five."""
    n, k = w.shape
    leaves = {
        "x": torch.randn(m, k), "A": torch.randn(r, k) / k**0.5, "B": torch.randn(n, r), "bias": torch.randn(n),
        "z": torch.randn(m, k) if with_z else None,
    }  # fmt: skip
    dy = torch.randn(m, n).to(dtype)

    def results(run: Callable[..., torch.Tensor], cast: torch.dtype) -> dict[str, torch.Tensor]:
        values = {key: None if v is None else v.to(dtype).to(cast).clone().requires_grad_() for key, v in leaves.items()}
        y = run(**values)
        y.backward(dy.to(cast))
        return {"y": y.detach(), **{key: v.grad for key, v in values.items() if v is not None}}

    def composed(order: Order, cast: torch.dtype) -> dict[str, torch.Tensor]:
        with peftk.use("reference"):
            return results(partial(lora, w=w.to(cast), dropout=dropout, order=order), cast)

    ours, every = results(op, dtype), orders(m, n, k, r)
    plains = [composed(order, dtype) for order in every]
    # With r = 1 and three rows S and T are three numbers, and all of dA and dB are as far off as those: luck (bench/LOG.md).
    times = 4 if m * r < 4 else 2
    for key, truth in composed(every[0], torch.float64).items():
        assert_no_worse_than_twice_plain(ours[key], [plain[key] for plain in plains], truth, times)
