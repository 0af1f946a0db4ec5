"""A linear layer with low-rank branches beside it, wherever their two factors come from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftk.methods.adapter import AdapterLayer
from peftk.nn import base_layer
from peftk.nn.dense_linear import add_low_rank


def _keep_off_fast_path(module: nn.Module, arguments: Any) -> None:
    """nn.TransformerEncoderLayer's fast path reads the weights itself, without adapters; it keeps off where a hook is found."""


class LowRankLinear(AdapterLayer):
    """y = W x + scale * B A D(x) for each adapter, W dense or in 4 bits: x (..., k) -> (..., n), in the base layer's dtype."""

    def __init__(self, module: nn.Module):
        super().__init__(base_layer(module), module)
        if self.base_layer is not module:
            self.base_layer.register_forward_pre_hook(_keep_off_fast_path)
        self.in_features, self.out_features = self.base_layer.in_features, self.base_layer.out_features
        self.dropout: dict[str, float] = {}

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A (r, k), B (n, r) and the scale of an adapter."""
        raise NotImplementedError

    def rank(self, name: str) -> int:
        """r; an adapter of rank 0 adds nothing here."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows is not None:
            return self._forward_rows(x)
        names = [name for name in self.running() if self.rank(name)]
        if not names:
            return self.base_layer.forward(x)
        first, *others = names
        y = self.base_layer.forward_low_rank(x, *self.factors(first), dropout=self._dropout(first))
        for name in others:
            y = add_low_rank(y, x, *self.factors(name), None, self._dropout(name), None)
        return y

    def _forward_rows(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer.forward(x)
        for names, rows in self.rows_of(x.shape[0], x.device).items():
            for name in names:
                if self.rank(name):
                    branch = add_low_rank(y[rows], x[rows], *self.factors(name), None, self._dropout(name), None)
                    y = y.index_copy(0, rows, branch)
        return y

    def _dropout(self, name: str) -> float:
        return self.dropout[name] if self.training else 0.0

    @torch.no_grad()
    def delta_weight(self, name: str) -> torch.Tensor:
        A, B, scale = self.factors(name)
        return (B @ A).mul_(scale)
