"""What the tests of nf4_lora_linear and lora_linear share: shapes, the plain composition, and a comparison with fp64."""

from __future__ import annotations

from collections.abc import Callable

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


def lora(x, w, A, B, bias, z, dropout):
    """The plain composition in the tensors' own dtype; autograd gives its gradients."""
    branch = x if z is None else z
    branch = philox_dropout(branch, dropout, SEED) if dropout else branch
    y = torch.nn.functional.linear(x, w, bias)
    return y + SCALE * torch.nn.functional.linear(torch.nn.functional.linear(branch, A), B)


def assert_forward_and_gradients(
    op: Callable[..., torch.Tensor], w: torch.Tensor, m: int, r: int, dtype: torch.dtype, dropout: float, with_z: bool
) -> None:
    """op(x, A, B, bias, z) with SCALE and SEED against lora with w (n, k): y and the gradients of all five."""
    n, k = w.shape
    leaves = {
        "x": torch.randn(m, k), "A": torch.randn(r, k) / k**0.5, "B": torch.randn(n, r), "bias": torch.randn(n),
        "z": torch.randn(m, k) if with_z else None,
    }  # fmt: skip
    dy, results = torch.randn(m, n).to(dtype), {}
    for name, cast in (("ours", dtype), ("plain", dtype), ("truth", torch.float64)):
        values = {key: None if v is None else v.to(dtype).to(cast).clone().requires_grad_() for key, v in leaves.items()}
        if name == "ours":
            y = op(**values)
            y.backward(dy)
        else:
            with peftk.use("reference"):
                y = lora(w=w.to(cast), dropout=dropout, **values)
                y.backward(dy.to(cast))
        results[name] = {"y": y.detach(), **{key: v.grad for key, v in values.items() if v is not None}}
    for key, truth in results["truth"].items():
        assert_no_worse_than_twice_plain(results["ours"][key], results["plain"][key], truth)
