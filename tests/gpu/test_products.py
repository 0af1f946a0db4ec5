"""Products with a 4-bit weight on a GPU, in sizes that no emulator reaches: right in every regime, the same every time, replayed
from a graph. The bodies run on the CPU as well, where small sizes show that they can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from numerics import assert_no_worse_than_twice_plain, row_scaled

import peftk
from bench.gpu.device import capture, why_no_gpu
from gpu.calls import CPU, GPU, Place, differing
from peftk.ops import nf4_lora_linear, regimes

SIZE, SMALL = 4096, 192  # n and k on a GPU; on the CPU
ROWS = (1, 7, 16, 33, 128, 512, 2048)
REGIMES = [None, *({"regime": "tile", "tokens": t} for t in (16, 32, 64, 128)), {"regime": "chunks", "chunk_mb": 8}]
RANK, SCALE, DROPOUT, SEED = 16, 0.5, 0.1, 11
PLACES = [pytest.param(CPU, SMALL, id="cpu"), *(pytest.param(p, SIZE, id=str(p), marks=pytest.mark.gpu) for p in GPU)]
AT_PLACES = pytest.mark.parametrize(("place", "size"), PLACES)


def usable(place: Place) -> None:
    if place.device == "cuda" and (why := why_no_gpu() or place.why_not("nf4_lora_linear")):
        pytest.skip(why)


@dataclass
class Layer:
    """A QLoRA layer (size, size) and a batch of m rows, on a place; ``step`` gives y and every gradient."""

    place: Place
    size: int
    m: int
    dtype: torch.dtype = torch.bfloat16
    w4: peftk.NF4Weight = field(init=False)

    def __post_init__(self) -> None:
        n = k = self.size
        self.w4 = peftk.quantize_nf4(row_scaled(n, k) / k**0.5).to(self.place.device)
        leaf = lambda *shape: torch.randn(*shape).to(self.place.device, self.dtype).requires_grad_()  # noqa: E731
        self.x, self.A, self.B, self.bias = leaf(self.m, k), leaf(RANK, k), leaf(n, RANK), leaf(n)
        self.dy = torch.randn(self.m, n).to(self.place.device, self.dtype)

    def step(self, dropout: float = 0.0) -> tuple[torch.Tensor, ...]:
        with peftk.use(self.place.implementation):
            y = nf4_lora_linear(self.x, self.w4, self.A, self.B, SCALE, self.bias, dropout=dropout, seed=SEED)
            return (y.detach(), *torch.autograd.grad(y, (self.x, self.A, self.B, self.bias), self.dy))

    def composed(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (self.x, self.A, self.B, self.bias)]
        x, A, B, bias = leaves
        y = torch.nn.functional.linear(x, self.w4.dequantize(torch.float32).to(dtype), bias) + SCALE * (x @ A.T @ B.T)
        return (y.detach(), *torch.autograd.grad(y, leaves, self.dy.to(dtype)))


def right(layer: Layer, step: Callable[[], tuple[torch.Tensor, ...]]) -> None:
    """y, dx, dA, dB and dbias against fp64, beside torch's own products on the same device."""
    plain, truth = layer.composed(layer.dtype), layer.composed(torch.float64)
    for got, near, exact in zip(step(), plain, truth, strict=True):
        assert_no_worse_than_twice_plain(got, near, exact)


@AT_PLACES
@pytest.mark.parametrize("regime", REGIMES, ids=str)
@pytest.mark.parametrize("m", ROWS)
def test_every_regime_is_right(place, size, m, regime):
    usable(place)
    layer = Layer(place, size, min(m, size))
    with regimes.forced(**(regime or {})):
        right(layer, layer.step)


@pytest.mark.parametrize("wrong", range(5))
def test_a_wrong_result_is_found(wrong):
    """An element of one result is a little off."""
    layer = Layer(CPU, SMALL, 16)

    def off() -> tuple[torch.Tensor, ...]:
        results = layer.step()
        results[wrong].view(-1)[3] += 0.05 * results[wrong].abs().max()
        return results

    with pytest.raises(AssertionError):
        right(layer, off)


@AT_PLACES
@pytest.mark.parametrize("m", ROWS)
def test_the_same_every_time(place, size, m):
    """With dropout, whose mask the seed gives."""
    usable(place)
    layer = Layer(place, size, min(m, size))
    first = layer.step(DROPOUT)
    for _ in range(5):
        assert not (what := differing(layer.step(DROPOUT), tuple(t.cpu() for t in first))), what


@pytest.mark.gpu
@pytest.mark.parametrize("place", GPU, ids=str)
@pytest.mark.parametrize("m", ROWS)
def test_replayed_from_a_graph(place, m):
    """Captured once, replayed on new inputs."""
    usable(place)
    layer = Layer(place, SIZE, m)
    replay = capture(lambda: layer.step(DROPOUT))
    with torch.no_grad():
        layer.x.copy_(torch.randn(m, SIZE))
    expected = tuple(t.cpu() for t in layer.step(DROPOUT))
    replayed = replay()
    torch.cuda.synchronize()
    assert not (what := differing(replayed, expected)), what
