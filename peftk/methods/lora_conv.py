"""LoRA on a convolution: the branch is a convolution to r channels with the base's window, and a pointwise one from there.

A (r, c, *window) and B (n, r / groups, 1, ...) have HF peft's shapes: A sees all channels also where the base has groups.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from peftk.methods.adapter import PlainLayer
from peftk.methods.lora_init import draw
from peftk.methods.low_rank import LowRank
from peftk.ops.philox_dropout import draw_seed, philox_dropout

if TYPE_CHECKING:
    from peftk.methods.lora import LoraConfig

CONVOLUTIONS = {nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d, nn.Conv3d: functional.conv3d}


def window(module: nn.Module) -> nn.Module:
    """A convolution without groups and without a weight of its own, which moves over x as ``module`` does."""
    return type(module)(
        module.in_channels, 1, module.kernel_size, module.stride, module.padding, module.dilation,
        bias=False, padding_mode=module.padding_mode, device="meta",
    )  # fmt: skip


def check_rank(path: str, module: nn.Module, r: int, config: LoraConfig) -> None:
    """ValueError where the base's groups don't divide a convolution's rank, or break a start's B A = 0."""
    base = module.base_layer if isinstance(module, LoraConv) else module
    groups = getattr(base, "groups", 1) if type(base) in CONVOLUTIONS else 1
    if r % groups:
        raise ValueError(f"r: expected a multiple of groups={groups} for the convolution {path}, got {r}")
    if groups > 1 and config.init_lora_weights == "orthogonal":
        raise ValueError(f'init_lora_weights: "orthogonal" does not start at B A = 0 with the groups of the convolution {path}')


class LoraConv(LowRank, PlainLayer):
    """nn.Conv1d, Conv2d or Conv3d with low-rank branches: x (b, c, *extent) -> (b, n, *extent'), in the base layer's dtype.

    The branch has the base's stride, padding, padding mode and dilation. (HF peft 0.21.2 leaves out dilation, where its output
    then has another extent, and the padding mode, where its merged layer computes something else.)
    """

    def __init__(self, module: nn.Module):
        super().__init__(module, module)
        self._convolve = CONVOLUTIONS[type(module)]
        self._window = (window(module),)  # in a tuple, so that it is no submodule
        self.in_channels, self.out_channels = module.in_channels, module.out_channels
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}

    def adapter_names(self) -> list[str]:
        return list(self.lora_A)

    def add_adapter(self, name: str, r: int, scaling: float, config: LoraConfig) -> None:
        """Fresh factors, as a linear layer's over all of a window."""
        base, window = self.base_layer, self.base_layer.kernel_size
        facts = {"device": self.weight.device, "dtype": self.factor_dtype()}
        A, B = draw(config.init_lora_weights, base.out_channels, base.in_channels * math.prod(window), r, **facts)
        A, B = A.view(r, -1, *window), B[:, : r // base.groups].reshape(-1, r // base.groups, *[1] * len(window))
        self.lora_A[name], self.lora_B[name] = nn.Parameter(A), nn.Parameter(B)
        self.scaling[name], self.dropout[name] = scaling, config.lora_dropout

    def delete_adapter(self, name: str) -> None:
        for table in (self.lora_A, self.lora_B, self.scaling, self.dropout):
            del table[name]

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return [self.lora_A[name], self.lora_B[name]]

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        return {"lora_A.weight": self.lora_A[name], "lora_B.weight": self.lora_B[name]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer.forward(x)
        if self.rows is None:
            for name in self.running():
                y = y + self._branch(name, x, y.dtype)
            return y
        if x.dim() != self.weight.dim():
            raise ValueError(f"names: expected a batch (b, c, ...) of {self.weight.dim()} dimensions, got {tuple(x.shape)}")
        for names, rows in self.rows_of(x.shape[0], x.device).items():
            for name in names:
                y = y.index_add(0, rows, self._branch(name, x[rows], y.dtype))
        return y

    def _branch(self, name: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """scale * B * (A * D(x)), where * convolves."""
        base, A, B = self.base_layer, self.lora_A[name], self.lora_B[name]
        if self.training and self.dropout[name] > 0:
            x = philox_dropout(x, self.dropout[name], draw_seed())
        s = self._window[0]._conv_forward(x, A.to(x.dtype), None)
        return (self._convolve(s, B.to(s.dtype), groups=base.groups) * self.scaling[name]).to(dtype)

    def why_no_merge(self, name: str) -> str:
        """With groups, B A mixes channels of one group into another's outputs, which the base's weight has no room for."""
        groups = self.base_layer.groups
        return "" if groups == 1 else f"its convolution has groups={groups}, whose weight has no room for what crosses groups"

    @torch.no_grad()
    def delta_weight(self, name: str) -> torch.Tensor:
        """(n, c, *window)"""
        A, B = self.lora_A[name], self.lora_B[name]
        return (B.flatten(1) @ A.flatten(1)).mul_(self.scaling[name]).view(B.shape[0], *A.shape[1:])
