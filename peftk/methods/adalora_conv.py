"""AdaLoRA on a convolution: to r channels with the base's window, times the values, and a pointwise one from there."""

from __future__ import annotations

import torch
from torch import nn

from peftk.methods.adalora_layer import AdaLoraLayer
from peftk.methods.adapter import PlainLayer
from peftk.methods.lora_conv import CONVOLUTIONS, window
from peftk.ops.philox_dropout import draw_seed, philox_dropout


class AdaLoraConv(AdaLoraLayer, PlainLayer):
    """nn.Conv1d, Conv2d or Conv3d with groups=1: x (b, c, *extent) -> (b, n, *extent'), in the base layer's dtype. A is
    (r, c * window), as HF peft's."""

    def __init__(self, module: nn.Module):
        super().__init__(module, module, module.out_channels, module.weight[0].numel())
        self._convolve = CONVOLUTIONS[type(module)]
        self._window = (window(module),)  # in a tuple, so that it is no submodule
        self.in_channels, self.out_channels = module.in_channels, module.out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer.forward(x)
        if self.rows is None:
            for name in self.running():
                y = y + self._branch(name, x, y.dtype) if self.rank(name) else y
            return y
        if x.dim() != self.weight.dim():
            raise ValueError(f"names: expected a batch (b, c, ...) of {self.weight.dim()} dimensions, got {tuple(x.shape)}")
        for names, rows in self.rows_of(x.shape[0], x.device).items():
            for name in names:
                y = y.index_add(0, rows, self._branch(name, x[rows], y.dtype)) if self.rank(name) else y
        return y

    def _branch(self, name: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        A, E, B = self.triplets(name)
        if self.training and self.dropout[name] > 0:
            x = philox_dropout(x, self.dropout[name], draw_seed())
        A, B = (A * E).view(-1, *self.weight.shape[1:]), B.view(*B.shape, *[1] * (self.weight.dim() - 2))
        s = self._window[0]._conv_forward(x, A.to(x.dtype), None)
        return (self._convolve(s, B.to(s.dtype)) * self.scaling[name]).to(dtype)

    def delta_weight(self, name: str) -> torch.Tensor:
        """(n, c, *window)"""
        return super().delta_weight(name).view(self.weight.shape)
