"""Data that can fail, and what exact enough means."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def row_scaled(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Gaussian weights, each row at a scale of its own: with equal scales a wrong block index would hide."""
    scale = torch.exp(2 * torch.randn(shape[0], *[1] * (len(shape) - 1)))
    return (torch.randn(*shape) * scale).to(dtype)


def assert_no_worse_than_twice_plain(
    got: torch.Tensor, plain: torch.Tensor | Sequence[torch.Tensor], truth: torch.Tensor, times: float = 2
) -> None:
    """Distance to the fp64 truth, in Frobenius norm and of the largest element, against that of a plain product: the largest
    where there are several, summed in other orders. A few sums of few numbers come out nearly exact in some order, by luck."""
    plains = [plain] if isinstance(plain, torch.Tensor) else plain
    assert all(got.dtype == p.dtype and got.shape == p.shape for p in plains) and not got.isnan().any()
    if truth.numel() == 0:
        return
    floor = torch.finfo(got.dtype).eps * truth.abs().max().item() / 8  # a plain product may be exact by luck on a few elements
    for distance in (torch.linalg.norm, lambda d: d.abs().max()):
        assert distance(got.double() - truth) <= times * max(distance(p.double() - truth) for p in plains) + floor


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any op made in memory of its own."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, tensor.numel())
        return made
