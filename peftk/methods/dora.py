"""DoRA (Liu et al. 2024): y = g (W + s B A) x + bias, g = m / ||W + s B A|| for each output row; m (n,), A and B are trained.

The norm is a constant for the gradient (section 4.3), and B A is never written out. For row i
    ||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 ||B A||^2,    ||B A||^2 = <B (A A^T), B>
where ||W||^2 is kept until W changes, W A^T is a product of the base layer with r rows, and A A^T is (r, r). In evaluation
without gradients g itself is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from peftk.nn.dense_linear import add_low_rank
from peftk.ops.philox_dropout import draw_seed, philox_dropout

if TYPE_CHECKING:
    from peftk.methods.lora_linear import LoraLinear


class Norms:
    """What a layer keeps of its norms: ||W||^2 by row (n,), fp32, and the adapters' g, each beside what it was computed from."""

    def __init__(self):
        self.squares: tuple[Any, torch.Tensor] | None = None
        self.scales: dict[str, tuple[Any, torch.Tensor]] = {}

    def drop(self) -> None:
        """Forget all."""
        self.squares, self.scales = None, {}


def _state(tensors: list[torch.Tensor]) -> list[tuple[torch.Tensor, int]]:
    """The objects, which a quantised layer's new bytes replace, and their versions, which writing in place counts up."""
    return [(t, t._version) for t in tensors]


def _is_same(kept: list[tuple[torch.Tensor, int]], now: list[tuple[torch.Tensor, int]]) -> bool:
    return len(kept) == len(now) and all(a is b and i == j for (a, i), (b, j) in zip(kept, now, strict=True))


def squared_norms(layer: LoraLinear) -> torch.Tensor:
    """||W||^2 by row, (n,) fp32 (fp64 for an fp64 W); computed anew where W's bytes changed or W is itself trained."""
    if torch.compiler.is_compiling() and layer.norms.squares is not None:
        return layer.norms.squares[1]  # merge and .to() drop it; a trace can't compare versions
    now = _state(layer.weight_tensors())
    kept = layer.norms.squares
    if kept is not None and _is_same(kept[0], now) and not layer.weight.requires_grad:
        return kept[1]
    w = layer.read_weight()
    squares = torch.linalg.vector_norm(w, dim=1, dtype=torch.promote_types(w.dtype, torch.float32)).square()
    layer.norms.squares = now, squares
    return squares


@torch.no_grad()
def weight_norm(layer: LoraLinear, name: str) -> torch.Tensor:
    """||W + s B A|| by row, (n,) fp32 (fp64 for fp64 factors). A row of zeros has the norm infinity: its g is 0."""
    with torch.autocast(layer.weight.device.type, enabled=False):
        squares = squared_norms(layer)
        A, B = (factor.to(squares.dtype) for factor in layer.difference(name))
        s, dtype = layer.scaling[name], layer.weight.dtype
        wa = layer.product(A.to(dtype) if dtype.is_floating_point else A).T.to(squares.dtype)  # (n, r)
        norm = (squares + (B * (2 * s * wa + s * s * (B @ (A @ A.T)))).sum(1)).clamp_min_(0).sqrt_()
    return norm.masked_fill_(norm == 0, torch.inf)


def scale(layer: LoraLinear, name: str) -> torch.Tensor:
    """g = m / ||W + s B A||, (n,) in m's dtype, at least fp32; differentiable in m."""
    m = layer.lora_magnitude_vector[name]
    wide = torch.promote_types(m.dtype, torch.float32)
    if torch.compiler.is_compiling():
        return m.to(wide) / weight_norm(layer, name).to(wide)
    if layer.training or torch.is_grad_enabled():
        layer.norms.scales.pop(name, None)  # what follows may change the factors in ways that no version counts
        return m.to(wide) / weight_norm(layer, name).to(wide)
    now = _state([*layer.weight_tensors(), layer.lora_A[name], layer.lora_B[name], m])
    kept = layer.norms.scales.get(name)
    if kept is None or not _is_same(kept[0], now):
        kept = layer.norms.scales[name] = now, m.to(wide) / weight_norm(layer, name).to(wide)
    return kept[1]


def forward_alone(layer: LoraLinear, x: torch.Tensor, name: str) -> torch.Tensor:
    """The one adapter that runs, without dropout: g (W x + s B A x) + bias in one product with W."""
    h = layer.base_layer.forward_low_rank(x, *layer.factors(name), layer.scaling[name], with_bias=False)
    y = scale(layer, name) * h  # 16-bit h: in fp32, since a rounded g would scale a whole row
    return (y if layer.bias is None else y + layer.bias).to(h.dtype)


def addition(layer: LoraLinear, x: torch.Tensor, name: str, dropout: float) -> torch.Tensor:
    """What the adapter adds to W x: (g - 1) W D(x) + g s B A D(x), (..., n), as HF peft applies dropout."""
    if dropout > 0:
        x = philox_dropout(x, dropout, draw_seed())
    p = layer.product(x)
    h = add_low_rank(p, x, *layer.difference(name), layer.scaling[name], None, 0.0, None)
    return (scale(layer, name) * h - p).to(p.dtype)


@torch.no_grad()
def delta_weight(layer: LoraLinear, name: str) -> torch.Tensor:
    """g (W + s B A) - W, (n, k) fp32. ValueError beside merged adapters: the norm is of the weight without them."""
    check_unmerged(layer)
    w = layer.read_weight().to(layer.factor_dtype())
    A, B = layer.difference(name)
    v = torch.addmm(w, B, A, alpha=layer.scaling[name])
    norm = torch.linalg.vector_norm(v, dim=1)
    g = layer.lora_magnitude_vector[name] / norm.masked_fill_(norm == 0, torch.inf)
    return v.mul_(g[:, None]).sub_(w)


def check_unmerged(layer: LoraLinear) -> None:
    """ValueError where adapters are merged into the weight that a norm needs as it was."""
    if layer.merged:
        raise ValueError(f"adapters: expected DoRA where nothing is merged, got one where {reason_beside(layer.merged)}")


def reason_beside(merged: list[str]) -> str:
    """Why DoRA does not go beside merged adapters."""
    names = ", ".join(merged)
    return f"{names} is merged: the norm is that of the weight without other adapters; unmerge, then merge all together"
