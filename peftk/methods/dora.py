"""DoRA (Liu et al. 2024): y = g (W x + s B A x) + bias, g = m / ||W + s B A|| for each output; m (n,), A and B are trained.

The norm is a constant for the gradient (section 4.3), and B A is never written out. For row i of W as a matrix (n, k)
    ||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 ||B A||^2,    ||B A||^2 = <B (A A^T), B>
where ||W||^2 is kept until W changes, W A^T is a product of the base layer with r rows, and A A^T is (r, r). In evaluation
without gradients g itself is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from peftk.methods.low_rank import LowRank

_State = list[tuple[torch.Tensor, int]]


class Norms:
    """What a layer keeps: ||W||^2 by row (n,), fp32, and the adapters' g, each beside the tensors that it was computed from."""

    def __init__(self):
        self.squares: tuple[_State, torch.Tensor] | None = None
        self.scales: dict[str, tuple[_State, torch.Tensor]] = {}

    def drop(self) -> None:
        """Forget all."""
        self.squares, self.scales = None, {}


class Decomposed(LowRank):
    """For layers that can have DoRA: left of AdapterLayer among the bases, whose ``weight`` and ``base_layer`` it reads."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.lora_magnitude_vector = nn.ParameterDict()  # (n,) or a shape of n elements, of the adapters with DoRA
        self.with_dora: set[str] = set()  # its names: asking a ParameterDict costs as much as a small product
        self.norms = Norms()

    def matrix(self) -> torch.Tensor:
        """W (n, k), an output a row."""
        return self.read_weight().flatten(1)

    def matrix_product(self, A: torch.Tensor) -> torch.Tensor:
        """W A^T (n, r) for A (r, k)."""
        w = self.matrix()
        return w @ A.to(w.dtype).T

    def magnitude_shape(self) -> tuple[int, ...]:
        """m's in HF peft's files."""
        return (self.matrix().shape[0],)

    def weight_tensors(self) -> list[torch.Tensor]:
        """What W is stored in."""
        return [self.base_layer.weight, *self.base_layer.buffers()]

    def add_magnitude(self, name: str) -> None:
        """m starts as the norm of W + s B A, so that g is 1."""
        norm = weight_norm(self, name)
        norm = norm.masked_fill(norm.isinf(), 0).to(self.factor_dtype())
        self.lora_magnitude_vector[name] = nn.Parameter(norm.view(self.magnitude_shape()))
        self.with_dora.add(name)

    def drop_magnitude(self, name: str) -> None:
        """Nothing where there is none."""
        self.norms.scales.pop(name, None)
        if name in self.with_dora:
            del self.lora_magnitude_vector[name]
            self.with_dora.remove(name)

    def magnitudes(self, name: str) -> dict[str, nn.Parameter]:
        """By HF peft's key; empty without DoRA."""
        return {"lora_magnitude_vector": self.lora_magnitude_vector[name]} if name in self.with_dora else {}

    def have_dora(self, names: Iterable[str]) -> bool:
        """Whether one of them does."""
        return not self.with_dora.isdisjoint(names)

    def why_no_merge(self, name: str) -> str:
        is_gone = self.merged and not self.keeps_original()
        return _reason_beside(self.merged) if is_gone and self.have_dora([name]) else ""

    def merge(self, names: list[str], keep_original: bool, is_tied: bool) -> None:
        super().merge(names, keep_original, is_tied)
        self.norms.drop()

    def unmerge(self) -> None:
        super().unmerge()
        self.norms.drop()

    def _apply(self, fn: Any, recurse: bool = True) -> Decomposed:
        self.norms.drop()
        return super()._apply(fn, recurse)


def _state(tensors: list[torch.Tensor]) -> _State:
    """The objects, which a quantised layer's new bytes replace, and their versions, which writing in place counts up."""
    return [(t, t._version) for t in tensors]


def _is_same(kept: _State, now: _State) -> bool:
    return len(kept) == len(now) and all(a is b and i == j for (a, i), (b, j) in zip(kept, now, strict=True))


def squared_norms(layer: Decomposed) -> torch.Tensor:
    """||W||^2 by row, (n,) fp32 (fp64 for an fp64 W); computed anew where W's bytes changed or W is itself trained."""
    if torch.compiler.is_compiling() and layer.norms.squares is not None:
        return layer.norms.squares[1]  # merge and .to() drop it; a trace can't compare versions
    now = _state(layer.weight_tensors())
    kept = layer.norms.squares
    if kept is not None and _is_same(kept[0], now) and not layer.weight.requires_grad:
        return kept[1]
    w = layer.matrix()
    squares = torch.linalg.vector_norm(w, dim=1, dtype=torch.promote_types(w.dtype, torch.float32)).square()
    layer.norms.squares = now, squares
    return squares


@torch.no_grad()
def weight_norm(layer: Decomposed, name: str) -> torch.Tensor:
    """||W + s B A|| by row, (n,) fp32 (fp64 for fp64 factors). A row of zeros has the norm infinity: its g is 0."""
    kind = "cpu" if layer.weight.is_meta else layer.weight.device.type  # autocast knows no meta device
    with torch.autocast(kind, enabled=False):
        squares = squared_norms(layer)
        A, B = (factor[0].to(squares.dtype) for factor in layer.matrices(name)[""])
        s, wa = layer.scaling[name], layer.matrix_product(A).to(squares.dtype)
        norm = (squares + (B * (2 * s * wa + s * s * (B @ (A @ A.T)))).sum(1)).clamp_min_(0).sqrt_()
    return norm.masked_fill_(norm == 0, torch.inf)


def scale(layer: Decomposed, name: str) -> torch.Tensor:
    """g = m / ||W + s B A||, (n,) in m's dtype, at least fp32; differentiable in m."""
    m = layer.lora_magnitude_vector[name]

    def fresh() -> torch.Tensor:
        wide = torch.promote_types(m.dtype, torch.float32)
        return m.flatten().to(wide) / weight_norm(layer, name).to(wide)

    if torch.compiler.is_compiling():
        return fresh()
    if layer.training or torch.is_grad_enabled():
        layer.norms.scales.pop(name, None)  # what follows may change the factors in ways that no version counts
        return fresh()
    now = _state([*layer.weight_tensors(), *layer.adapter_parameters(name)])
    kept = layer.norms.scales.get(name)
    if kept is None or not _is_same(kept[0], now):
        kept = layer.norms.scales[name] = now, fresh()
    return kept[1]


def rescaled(g: torch.Tensor, h: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """g h + bias in h's dtype. With a 16-bit h in fp32 between: a rounded g would scale a whole output."""
    return (g * h if bias is None else g * h + bias).to(h.dtype)


@torch.no_grad()
def delta_matrix(layer: Decomposed, name: str) -> torch.Tensor:
    """g (W + s B A) - W as a matrix (n, k), fp32. ValueError beside merged adapters."""
    check_unmerged(layer)
    w = layer.matrix().to(layer.factor_dtype())
    A, B = (factor[0] for factor in layer.matrices(name)[""])
    v = torch.addmm(w, B, A, alpha=layer.scaling[name])
    norm = torch.linalg.vector_norm(v, dim=1)
    g = layer.lora_magnitude_vector[name].flatten() / norm.masked_fill_(norm == 0, torch.inf)
    return v.mul_(g[:, None]).sub_(w)


def check_unmerged(layer: Decomposed) -> None:
    """ValueError where adapters are merged into the weight that a norm needs as it was."""
    if layer.merged:
        raise ValueError(f"adapters: expected DoRA where nothing is merged, got one where {_reason_beside(layer.merged)}")


def _reason_beside(merged: list[str]) -> str:
    names = ", ".join(merged)
    return f"{names} is merged: the norm is that of the weight without other adapters; unmerge, then merge all together"
