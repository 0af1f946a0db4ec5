"""Products with 4-bit weights on a GPU, for both backends: the regime of each (regimes.py), then its kernel, or chunks of W by
torch's own product. A backend's ``Kernels`` are thin functions over its launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from peftk.ops import regimes
from peftk.ops.gpu import GpuModel
from peftk.ops.philox_dropout import philox_dropout

BLOCK = 64  # k and blocks that are multiples of it suit the tensor kernels
VECTOR = 16  # bytes that their rows are aligned to
MOST_WEIGHTS = 16  # of a launch: kMostWeights in csrc/cuda/weight4.cuh


@dataclass(frozen=True)
class Weight:
    """W (n, k) in 4 bits; contiguous parts."""

    packed: torch.Tensor
    absmax: torch.Tensor
    absmax_scale: torch.Tensor | None
    absmax_offset: torch.Tensor | None
    n: int
    k: int
    block_size: int
    quant_type: str

    @property
    def suits_tensor_cores(self) -> bool:
        return self.k % BLOCK == 0 and self.block_size % BLOCK == 0 and self.packed.data_ptr() % VECTOR == 0


@dataclass
class Output:
    """y = x W^T + bias + scale * s b^T. ``forward`` sets split."""

    weight: Weight
    bias: torch.Tensor | None  # (n,)
    y: torch.Tensor  # (m, n)
    s: torch.Tensor | None  # (m, r); None: no low-rank branch
    b: torch.Tensor | None  # (n, r)
    scale: float
    split: int = 1  # runs of k


@dataclass(frozen=True)
class Gradient:
    """dx += dy W + D(t a), D dropout."""

    weight: Weight
    dy: torch.Tensor  # (m, n), rows with a stride
    t: torch.Tensor | None  # (m, r); None: no low-rank branch
    a: torch.Tensor | None  # (r, k)
    dropout: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Shrink:
    """out = scale * D(wide) factor."""

    wide: torch.Tensor  # (m, c), rows with a stride
    factor: torch.Tensor  # (c, r), any strides
    scale: float
    dropout: float
    seed: int
    out: torch.Tensor  # (m, r)


@dataclass(frozen=True)
class Outer:
    """out = scale * thin^T D(wide)."""

    thin: torch.Tensor  # (m, r)
    wide: torch.Tensor  # (m, c), rows with a stride
    scale: float
    dropout: float
    seed: int
    out: torch.Tensor  # (r, c), any strides


class Kernels(Protocol):
    """What a backend has: regime is one of regimes.DECODING."""

    backend: str

    def model(self, device: torch.device) -> GpuModel: ...
    def has_tensor_kernels(self, model: GpuModel) -> bool: ...
    def forward(self, regime: str, tokens: int, x: torch.Tensor, outputs: list[Output]) -> None: ...
    def backward(self, regime: str, tokens: int, split: int, gradients: list[Gradient], dx: torch.Tensor) -> None: ...
    def decode(self, weight: Weight, rows: range, columns: range, out: torch.Tensor) -> None: ...


def weights_of(
    packed: Sequence[torch.Tensor],
    absmax: Sequence[torch.Tensor],
    absmax_scale: Sequence[torch.Tensor | None],
    absmax_offset: Sequence[torch.Tensor | None],
    n: Sequence[int],
    k: int,
    block_size: Sequence[int],
    quant_type: Sequence[str],
) -> list[Weight]:
    """An op's lists as Weights."""
    parts = zip(packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, strict=True)
    return [Weight(codes.contiguous(), c.contiguous(), s, o, rows, k, size, kind) for codes, c, s, o, rows, size, kind in parts]


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., k) -> (m, k), neighbours of a row side by side; a view where x allows one."""
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return rows if rows.stride(1) == 1 else rows.contiguous()


def is_aligned(rows: torch.Tensor) -> bool:
    return rows.stride(0) * rows.element_size() % VECTOR == 0 and rows.data_ptr() % VECTOR == 0


def padded(rows: torch.Tensor) -> torch.Tensor:
    """rows (m, n) that is_aligned, copied where they weren't."""
    if rows.stride(1) == 1 and is_aligned(rows):
        return rows
    (m, n), whole = rows.shape, VECTOR // rows.element_size()
    fresh = rows.new_empty(m, -(-n // whole) * whole)[:, :n]
    fresh.copy_(rows)
    return fresh


def kind_of(kernels: Kernels, model: GpuModel, dtype: torch.dtype, weights: Sequence[Weight]) -> str:
    """ "tensor" where the tensor kernels take all of these, else "plain"."""
    fits = dtype in (torch.bfloat16, torch.float16) and kernels.has_tensor_kernels(model)
    return "tensor" if fits and all(weight.suits_tensor_cores for weight in weights) else "plain"


def described(kernels: Kernels, product: str, rows: torch.Tensor, weight: Weight) -> str:
    """Which kernel takes a product with rows (..., k) of x, or (..., n) of dy, in words; meta tensors will do."""
    m, model = rows.numel() // max(rows.shape[-1], 1), kernels.model(rows.device)
    row = regimes.choose(kernels.backend, model, product, kind_of(kernels, model, rows.dtype, [weight]), m)
    size = f", {row.chunk_mb} MB a chunk" if row.regime == "chunks" else f", {row.tokens} rows of x a tile"
    return f"{row.regime}{size} (regimes.csv, {row.kind} from m = {row.least_m} on {model.name}: {row.source})"


def forward(kernels: Kernels, x: torch.Tensor, outputs: Sequence[Output]) -> None:
    """Every y for x (m, k)."""
    m, k = x.shape
    model = kernels.model(x.device)
    together: dict[tuple[str, int], list[Output]] = {}
    for output in outputs:
        if not output.y.numel():
            continue
        kind = kind_of(kernels, model, x.dtype, [output.weight])
        row = regimes.choose(kernels.backend, model, "forward", kind, m)
        if row.regime == "chunks":
            _forward_by_chunks(kernels, x, output, row.chunk_mb << 20)
        else:
            output.split = row.split(model, m, output.weight.n, k)
            together.setdefault((row.regime, row.tokens), []).append(output)
    for (regime, tokens), group in together.items():
        kernels.forward(regime, tokens, x if regime == "simple" else padded(x), group)


def backward(kernels: Kernels, gradients: Sequence[Gradient], dx: torch.Tensor) -> None:
    """dx (m, k), summed over the list."""
    m, k = dx.shape
    if not dx.numel():
        return
    model = kernels.model(dx.device)
    kind = kind_of(kernels, model, dx.dtype, [gradient.weight for gradient in gradients])
    row = regimes.choose(kernels.backend, model, "backward", kind, m)
    if row.regime == "chunks":
        _backward_by_chunks(kernels, gradients, dx, row.chunk_mb << 20)
        return
    if row.regime != "simple":
        gradients = [replace(gradient, dy=padded(gradient.dy)) for gradient in gradients]
    depth = sum(gradient.weight.n for gradient in gradients)
    kernels.backward(row.regime, row.tokens, row.split(model, m, k, depth), list(gradients), dx)


def _forward_by_chunks(kernels: Kernels, x: torch.Tensor, output: Output, chunk_bytes: int) -> None:
    """The branch and the bias first; then each chunk of W's rows gives as many columns of y."""
    y, weight = output.y, output.weight
    has_start = output.s is not None or output.bias is not None
    if output.bias is not None:
        y.copy_(output.bias.expand_as(y))
    if output.s is not None:
        y.addmm_(output.s, output.b.t(), beta=0 if output.bias is None else 1, alpha=output.scale)
    rows = max(1, chunk_bytes // (weight.k * x.element_size()))
    workspace = torch.empty(min(rows, weight.n) * weight.k, dtype=x.dtype, device=x.device)
    for first in range(0, weight.n, rows):
        chunk = range(first, min(first + rows, weight.n))
        w = workspace[: len(chunk) * weight.k].view(len(chunk), weight.k)
        kernels.decode(weight, chunk, range(weight.k), w)
        y[:, first : first + len(chunk)].addmm_(x, w.t(), beta=1 if has_start else 0)


def _backward_by_chunks(kernels: Kernels, gradients: Sequence[Gradient], dx: torch.Tensor, chunk_bytes: int) -> None:
    """Chunks of W's columns, so that no column of dx is rounded between two chunks."""
    has_start = low_rank_gradient(gradients, dx)
    k, depth = dx.shape[1], max(gradient.weight.n for gradient in gradients)
    columns = max(BLOCK, chunk_bytes // (depth * dx.element_size()) // BLOCK * BLOCK)
    workspace = torch.empty(depth * min(columns, k), dtype=dx.dtype, device=dx.device)
    for first in range(0, k, columns):
        chunk = range(first, min(first + columns, k))
        part = dx[:, first : first + len(chunk)]
        for number, gradient in enumerate(gradients):
            w = workspace[: gradient.weight.n * len(chunk)].view(gradient.weight.n, len(chunk))
            kernels.decode(gradient.weight, range(gradient.weight.n), chunk, w)
            part.addmm_(gradient.dy, w, beta=1 if has_start or number else 0)


def low_rank_gradient(gradients: Sequence[Gradient], out: torch.Tensor) -> bool:
    """out (m, k) = sum of D(t a); False, and nothing is written, where no gradient has a branch."""
    started = False
    for gradient in gradients:
        if gradient.t is None:
            continue
        if gradient.dropout:
            piece = philox_dropout(gradient.t @ gradient.a, gradient.dropout, gradient.seed)
            out.add_(piece) if started else out.copy_(piece)
        else:
            out.addmm_(gradient.t, gradient.a, beta=1 if started else 0)
        started = True
    return started


def partials(outputs: Sequence[Any], device: torch.device) -> torch.Tensor | None:
    """Room for the partial sums of those outputs that are split: (split, m, n) fp32, one after the other."""
    count = sum(output.split * output.y.numel() for output in outputs if output.split > 1)
    return torch.empty(count, dtype=torch.float32, device=device) if count else None
