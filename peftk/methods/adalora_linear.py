"""AdaLoRA on a linear layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from peftk.methods.adalora_layer import AdaLoraLayer
from peftk.methods.lora_linear import keep_off_fast_path
from peftk.methods.row_branches import forward_rows
from peftk.nn import base_layer
from peftk.nn.dense_linear import add_low_rank


class AdaLoraLinear(AdaLoraLayer):
    """A linear base layer, dense or in 4 bits: x (..., k) -> (..., n), in the base layer's dtype."""

    def __init__(self, module: nn.Module):
        base = base_layer(module)
        super().__init__(base, module, base.out_features, base.in_features)
        if base is not module:
            base.register_forward_pre_hook(keep_off_fast_path)
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows is not None:
            return forward_rows(self, x, self._branches, self._add)
        branches = self._branches(self.running())
        if not branches:
            return self.base_layer.forward(x)
        (A, B, scale, dropout), *others = branches
        return self._add(self.base_layer.forward_low_rank(x, A, B, scale, dropout=dropout), x, others)

    def _branches(self, names: Iterable[str]) -> list[tuple[torch.Tensor, torch.Tensor, float, float]]:
        """(Lambda Q, P, scale, dropout) of each adapter that has triplets left: a LoRA's A and B."""
        return [
            (A * E, B, self.scaling[n], self.dropout[n] if self.training else 0.0)
            for n in names
            if self.rank(n)
            for A, E, B in [self.own(*self.triplets(n))]
        ]

    @staticmethod
    def _add(y: torch.Tensor, x: torch.Tensor, branches: list) -> torch.Tensor:
        for A, B, scale, dropout in branches:
            y = add_low_rank(y, x, A, B, scale, None, dropout, None)
        return y
