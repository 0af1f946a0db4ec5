"""LoRA on a convolution: the branch is a convolution to r channels with the base's window, and a pointwise one from there.

A (r, c, *window) and B (n, r / groups, 1, ...) have HF peft's shapes: A sees all channels also where the base has groups.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from peftk.methods import dora
from peftk.methods.adapter import PlainLayer
from peftk.methods.dora import Decomposed
from peftk.methods.lora_init import draw
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
        raise ValueError(
            f'init_lora_weights: "orthogonal" does not start at B A = 0 with the groups of the convolution {path}: '
            'use True or "gaussian"'
        )


class LoraConv(Decomposed, PlainLayer):
    """nn.Conv1d, Conv2d or Conv3d with low-rank branches: x (b, c, *extent) -> (b, n, *extent'), in the base layer's dtype.

    The branch has the base's stride, padding, padding mode and dilation. (HF peft 0.21.2 leaves out dilation, where its output
    then has another extent, and the padding mode, where its merged layer computes something else.)
    """

    VARIANTS = frozenset({"use_dora", "orthogonal"})

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
        if config.use_dora:
            self.add_magnitude(name)

    def magnitude_shape(self) -> tuple[int, ...]:
        return (1, self.out_channels, *[1] * len(self.base_layer.kernel_size))

    def delete_adapter(self, name: str) -> None:
        for table in (self.lora_A, self.lora_B, self.scaling, self.dropout):
            del table[name]
        self.drop_magnitude(name)

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return [self.lora_A[name], self.lora_B[name], *self.magnitudes(name).values()]

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        return {"lora_A.weight": self.lora_A[name], "lora_B.weight": self.lora_B[name], **self.magnitudes(name)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows is None:
            return self._forward_names(x, self.running())
        y = self.base_layer.forward(x)
        if x.dim() != self.weight.dim():
            raise ValueError(f"names: expected a batch (b, c, ...) of {self.weight.dim()} dimensions, got {tuple(x.shape)}")
        for names, rows in self.rows_of(x.shape[0], x.device).items():
            for name in names:
                y = y.index_add(0, rows, self._addition(name, x[rows], None).to(y.dtype))
        return y

    def _forward_names(self, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        p = self._product(x) if self.have_dora(names) else None
        y = self.base_layer.forward(x) if p is None else p
        for name in names:
            y = y + self._addition(name, x, p).to(y.dtype)
        return y if p is None or self.bias is None else y + self._by_channel(self.bias).to(y.dtype)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """W * x, without the bias."""
        return self.base_layer._conv_forward(x, self.weight, None)

    def _by_channel(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, *[1] * len(self.base_layer.kernel_size))

    def _addition(self, name: str, x: torch.Tensor, p: torch.Tensor | None) -> torch.Tensor:
        """What the adapter adds to W * x: its branch, or with DoRA (g - 1) W * D(x) + g times it. ``p``: W * x, if known."""
        if self.training and self.dropout[name] > 0:
            x, p = philox_dropout(x, self.dropout[name], draw_seed()), None
        branch = self._branch(name, x)
        if not self.have_dora([name]):
            return branch
        dora.check_unmerged(self)
        p = self._product(x) if p is None else p
        return self._by_channel(dora.scale(self, name)) * (p + branch) - p

    def _branch(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """scale * B * (A * x), where * convolves."""
        s = self._window[0]._conv_forward(x, self.lora_A[name].to(x.dtype), None)
        return self._convolve(s, self.lora_B[name].to(s.dtype), groups=self.base_layer.groups) * self.scaling[name]

    def why_no_merge(self, name: str) -> str:
        """With groups, B A mixes channels of one group into another's outputs, which the base's weight has no room for."""
        groups = self.base_layer.groups
        if groups > 1:
            return f"its convolution has groups={groups}, whose weight has no room for what crosses groups"
        return super().why_no_merge(name)

    @torch.no_grad()
    def delta_weight(self, name: str) -> torch.Tensor:
        """(n, c, *window)"""
        matrix = dora.delta_matrix(self, name) if self.have_dora([name]) else self.product_matrix(name)
        return matrix.view(self.weight.shape)
