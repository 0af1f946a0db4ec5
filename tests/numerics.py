"""Data that can fail, and what exact enough means."""

from __future__ import annotations

import torch


def row_scaled(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Gaussian weights, each row at a scale of its own: with equal scales a wrong block index would hide."""
    scale = torch.exp(2 * torch.randn(shape[0], *[1] * (len(shape) - 1)))
    return (torch.randn(*shape) * scale).to(dtype)


def assert_no_worse_than_twice_plain(got: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    """Distance to the fp64 truth, in Frobenius norm and of the largest element, against that of a plain product."""
    assert got.dtype == plain.dtype and got.shape == plain.shape and not got.isnan().any()
    if truth.numel() == 0:
        return
    floor = torch.finfo(got.dtype).eps * truth.abs().max().item() / 8  # a plain product may be exact by luck on a few elements
    for distance in (torch.linalg.norm, lambda d: d.abs().max()):
        assert distance(got.double() - truth) <= 2 * distance(plain.double() - truth) + floor
