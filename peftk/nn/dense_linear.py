"""Linear layers with a dense weight, behind the base-layer interface."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from peftk.ops.dispatch import is_straight
from peftk.ops.lora_linear import has_kernel, lora_linear
from peftk.ops.nf4_lora_linear import check_low_rank
from peftk.ops.philox_dropout import draw_seed, philox_dropout
from peftk.shards import factor, is_shard


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer that stores its weight as (k, n). Told by name, so that it need not be installed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")


FEW_ROWS = 16


def _linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """torch's, the way that passes over W fastest.

    A few rows in bf16 on a CPU without gradients: (W x^T)^T. 49152 x 576, two threads of a Xeon with AMX, from memory: 1.5 ms for
    one row where x W^T takes 4.3, and 1.7 to 2.3 for 2 to 16 rows where it takes 3.9 to 4.5 (torch 2.13).
    Strides of x that don't fold, as those of hidden[:, -1:] don't: on rows, since torch's batched product would copy W for each
    entry of the batch (SmolLM2's head in bf16: 165 ms, in the place of 9)."""
    sizes, strides = x.shape, x.stride()
    if torch.compiler.is_compiling():
        return functional.linear(x, w, bias)
    is_few = 0 < x.numel() <= FEW_ROWS * sizes[-1] and x.dtype is w.dtype is torch.bfloat16
    if is_few and is_straight(x) and not (w.requires_grad and torch.is_grad_enabled()):
        return _few_rows(x.reshape(-1, sizes[-1]), w, bias).view(*sizes[:-1], w.shape[0])
    if all(strides[i] == strides[i + 1] * sizes[i + 1] for i in range(x.dim() - 2)):
        return functional.linear(x, w, bias)
    return functional.linear(x.reshape(-1, sizes[-1]), w, bias).view(*sizes[:-1], w.shape[0])


def _few_rows(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if x.shape[0] == 1:
        return torch.mv(w, x[0]) if bias is None else torch.addmv(bias, w, x[0])
    y = torch.mm(w, x.t()) if bias is None else torch.addmm(bias[:, None], w, x.t())
    return y.t().contiguous()


def add_low_rank(
    y: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    z: torch.Tensor | None,
    dropout: float,
    seed: int | None,
) -> torch.Tensor:
    """y + scale * D(z) A^T B^T in y's dtype; A (r, k), B (n, r), z (..., k) or None for x."""
    check_low_rank(x, (B.shape[0], x.shape[-1]), A, B, z, dropout)
    branch = x if z is None else z
    if dropout > 0:
        branch = philox_dropout(branch, dropout, draw_seed() if seed is None else seed)
    s = functional.linear(branch, A.to(branch.dtype))
    return y + functional.linear(s, B.to(s.dtype)) * scale


def add_low_rank_rows(
    y: torch.Tensor,
    x: torch.Tensor,
    A: Sequence[torch.Tensor],
    B: Sequence[torch.Tensor],
    scale: Sequence[float],
    index: Sequence[int],
    z: torch.Tensor | None,
) -> torch.Tensor:
    """y (b, ..., n) and beside it each adapter's branch for its own of the b rows, as ``peftk.ops.nf4_lora_linear_rows`` has
    them."""
    branch = x if z is None else z
    for i, (a, b, one) in enumerate(zip(A, B, scale, strict=True)):
        rows = torch.tensor([row for row, adapter in enumerate(index) if adapter == i], device=x.device)
        if rows.numel():
            s = functional.linear(branch[rows], a.to(branch.dtype))
            y = y.index_add(0, rows, (functional.linear(s, b.to(s.dtype)) * one).to(y.dtype))
    return y


class Dense:
    """What all layouts share; ``self.weight`` is (n, k) or, for Conv1D, (k, n), and ``_rows()`` W (n, k); of a layer that
    is split among processes (nn/tensor_parallel.py) this one's part."""

    is_tensor_parallel: bool = False

    def _check_whole(self) -> None:
        if is_shard(self.weight):
            raise ValueError("layer: expected a whole weight, got one that is split among processes; change weights before that")

    def _own(self, parameter: torch.Tensor | None) -> torch.Tensor | None:
        return factor(parameter) if self.is_tensor_parallel and parameter is not None else parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., k) -> (..., n)."""
        return _linear(x, self._rows(), self._own(self.bias))

    def forward_low_rank(
        self,
        x: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        scale: float,
        z: torch.Tensor | None = None,
        dropout: float = 0.0,
        seed: int | None = None,
        with_bias: bool = True,
    ) -> torch.Tensor:
        """forward(x) + scale * D(x if z is None else z) A^T B^T, shapes as in ``peftk.ops.lora_linear``."""
        if has_kernel(x, self._own(self.weight)):
            return lora_linear(x, self._rows(), A, B, scale, self._own(self.bias) if with_bias else None, z, dropout, seed)
        return add_low_rank(self.forward(x) if with_bias else self.product(x), x, A, B, scale, z, dropout, seed)

    def forward_low_rank_rows(
        self,
        x: torch.Tensor,
        A: Sequence[torch.Tensor],
        B: Sequence[torch.Tensor],
        scale: Sequence[float],
        index: Sequence[int],
        z: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """forward(x), and for row i of the batch the branch of adapter index[i]; -1: none."""
        return add_low_rank_rows(self.forward(x), x, A, B, scale, index, z)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T, (..., k) -> (..., n), without the bias."""
        return _linear(x, self._rows(), None)

    def rounded(self, w: torch.Tensor) -> torch.Tensor:
        """w as ``set_dense_weight(w)`` would store it, in w's dtype; nothing is stored."""
        return w.to(self.weight.dtype).to(w.dtype)

    def weight_snapshot(self) -> torch.Tensor:
        """The stored weight's bytes, a copy."""
        return self.weight.detach().clone()

    @torch.no_grad()
    def restore_weight(self, snapshot: torch.Tensor) -> None:
        """Put a snapshot back, bit for bit."""
        self._check_whole()
        self.weight.copy_(snapshot)


class DenseLinear(Dense, nn.Linear):
    """nn.Linear behind the base-layer interface."""

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> DenseLinear:
        """Shares the linear layer's parameters: nothing is copied. TypeError for another layer."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected nn.Linear, got {type(linear).__name__}")
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def _rows(self) -> torch.Tensor:
        return self._own(self.weight)

    def dense_weight(self) -> torch.Tensor:
        """W (n, k) in its own dtype; not a copy."""
        return self.weight.detach()

    @torch.no_grad()
    def set_dense_weight(self, w: torch.Tensor) -> None:
        """Replace W by w (n, k), rounded once to the layer's dtype. ValueError for another shape."""
        self._check_whole()
        if w.shape != self.weight.shape:
            raise ValueError(f"w: expected {tuple(self.weight.shape)}, got {tuple(w.shape)}")
        self.weight.copy_(w)


class DenseConv1D(Dense, nn.Module):
    """transformers' Conv1D (weight (k, n)) behind the base-layer interface."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None):
        super().__init__()
        if weight.dim() != 2:
            raise ValueError(f"weight: expected shape (k, n), got {tuple(weight.shape)}")
        self.weight, self.bias = weight, bias
        self.in_features, self.out_features = weight.shape
        self.nf, self.nx = self.out_features, self.in_features

    @classmethod
    def from_conv1d(cls, conv1d: nn.Module) -> DenseConv1D:
        """Shares the layer's parameters: nothing is copied. TypeError for another layer, whose weight may lie the other way."""
        if not is_conv1d(conv1d):
            raise TypeError(f"conv1d: expected transformers' Conv1D, got {type(conv1d).__name__}")
        return cls(conv1d.weight, conv1d.bias).train(conv1d.training)

    def _rows(self) -> torch.Tensor:
        return self._own(self.weight).T

    def dense_weight(self) -> torch.Tensor:
        """W (n, k) in its own dtype; a view."""
        return self.weight.detach().T

    @torch.no_grad()
    def set_dense_weight(self, w: torch.Tensor) -> None:
        """Replace W by w (n, k), rounded once to the layer's dtype. ValueError for another shape."""
        self._check_whole()
        if w.shape != self.weight.T.shape:
            raise ValueError(f"w: expected {tuple(self.weight.T.shape)}, got {tuple(w.shape)}")
        self.weight.copy_(w.T)
