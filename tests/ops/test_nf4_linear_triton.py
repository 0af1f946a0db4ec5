"""nf4_linear's Triton kernels in the emulator, tile by tile: against fp64, the exact W, and what they read."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import pytest
import torch
from emulation.triton_door import PtxDoor
from numerics import assert_no_worse_than_twice_plain, row_scaled

import peftk
from peftk.ops import gpu, philox_dropout
from peftk.ops.gpu_product import Gradient, Output, Weight

if why := PtxDoor().why_not():
    pytest.skip(why, allow_module_level=True)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALE, SEED = 0.5, 2**62 + 5
DOOR = PtxDoor()
KERNELS = importlib.import_module("peftk.ops.nf4_linear.triton_kernel").KERNELS


@pytest.fixture(autouse=True)
def through_the_emulator():
    with gpu.through("triton", DOOR):
        yield


@dataclass(frozen=True)
class Case:
    """A list of weights (n, k) of one format, and how it is launched."""

    regime: str
    tokens: int
    m: int
    k: int
    rows: tuple[int, ...]  # n of each
    dtype: torch.dtype = BF16
    rank: int = 0
    bias: bool = True
    split: int = 1
    dropout: float = 0.0
    block_size: int = 64
    nested: bool = True
    quant_type: str = "nf4"

    def weights(self) -> list[tuple[Weight, torch.Tensor]]:
        """Each with its fp32 values."""
        return [weight4(n, self.k, self.block_size, self.nested, self.quant_type) for n in self.rows]


def weight4(n: int, k: int, block_size: int = 64, nested: bool = True, quant_type: str = "nf4") -> tuple[Weight, torch.Tensor]:
    """Small beside a low-rank branch of ones, whose errors would hide."""
    w4 = peftk.quantize_nf4(row_scaled(n, k) / 30, block_size, double_quant=nested, quant_type=quant_type)
    return Weight(*w4.tensors(), n, k, block_size, quant_type), w4.dequantize(FP32)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


# Every tile, dtype and format; lists, splits whose last run is shorter, low ranks below, at and above a step, one row of x.
CASES = [
    Case("few", 8, 3, 1088, (50,), split=2),
    Case("tile", 16, 14, 192, (130, 3), rank=5, dropout=0.3),
    Case("tile", 32, 35, 576, (144,), FP16, rank=64, bias=False, nested=False, quant_type="fp4"),
    Case("tile", 64, 66, 320, (18, 70), block_size=4096, split=2),
    Case("tile", 128, 130, 192, (200,), FP16, rank=16, dropout=0.2, block_size=128),
    Case("simple", 8, 1, 320, (70,), FP32, rank=1, split=2),
    Case("simple", 64, 130, 576, (64,), FP32, rank=8, nested=False),  # one chain of sums is 3 times as far off as torch's
    Case("simple", 64, 70, 80, (66,), FP32),
    Case("simple", 64, 70, 33, (15, 7), rank=8, dropout=0.5, block_size=32, quant_type="fp4"),
    Case("simple", 8, 3, 250, (9,), FP16, bias=False, block_size=4096, split=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: Case):
    x = torch.randn(case.m, case.k + 8).to(case.dtype)[:, : case.k]
    outputs, plain, truth = [], [], []
    orders = [torch.arange(case.k), torch.arange(case.k).flip(0), torch.randperm(case.k)]
    for weight, w in case.weights():
        s, b = (torch.randn(size, case.rank).to(case.dtype) if case.rank else None for size in (case.m, weight.n))
        bias = torch.randn(weight.n).to(case.dtype) if case.bias else None
        outputs.append(Output(weight, bias, poisoned(case.m, weight.n, dtype=case.dtype), s, b, SCALE, case.split))
        for results, kind in ((plain, case.dtype), (truth, torch.float64)):
            low = 0 if s is None else SCALE * s.to(kind) @ b.to(kind).T
            added = None if bias is None else bias.to(kind)
            ys = [torch.nn.functional.linear(x[:, k].to(kind), w[:, k].to(kind), added) for k in orders]
            results.append([y + low for y in ys] if kind == case.dtype else ys[0] + low)
    KERNELS.forward(case.regime, case.tokens, x, outputs)
    for output, *expected in zip(outputs, plain, truth, strict=True):
        assert_no_worse_than_twice_plain(output.y, *expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case: Case):
    gradients, plain, truth = [], 0, 0
    for number, (weight, w) in enumerate(case.weights()):
        dy = torch.randn(case.m, weight.n + 8).to(case.dtype)[:, : weight.n]
        t, a = (torch.randn(*size).to(case.dtype) if case.rank else None for size in ((case.m, case.rank), (case.rank, case.k)))
        gradients.append(Gradient(weight, dy, t, a, case.dropout, SEED + number))
        keep = philox_dropout(torch.ones(case.m, case.k), case.dropout, SEED + number) if case.dropout else 1
        for kind in (case.dtype, torch.float64):
            dx = dy.to(kind) @ w.to(kind)
            dx = dx if t is None else dx + (t.to(kind) @ a.to(kind) * keep).to(kind)
            plain, truth = (plain + dx, truth) if kind == case.dtype else (plain, truth + dx)
    dx = poisoned(case.m, case.k, dtype=case.dtype)
    regime = "tile" if case.regime == "few" else case.regime
    KERNELS.backward(regime, max(case.tokens, 16), case.split, gradients, dx)
    assert_no_worse_than_twice_plain(dx, plain, truth)


@pytest.mark.parametrize("k,block_size", [(128, 64), (66, 16)])
def test_w_is_exact(k: int, block_size: int):
    """With the identity for x and dy, products are W itself, rounded once. Blocks of 16 are the smallest a kernel is given."""
    constants = torch.rand(-(-48 * k // block_size)) * 2 - 1
    packed = torch.randint(0, 256, (24 * k,), dtype=torch.uint8)
    w = reference_values(packed, constants, block_size, 48, k)
    weight = Weight(packed, constants, None, None, 48, k, block_size, "nf4")
    regime, tokens = ("tile", 128) if k % 64 == 0 else ("simple", 64)
    y, dx = poisoned(k, 48, dtype=BF16), poisoned(48, k, dtype=BF16)
    KERNELS.forward(regime, tokens, torch.eye(k, dtype=BF16), [Output(weight, None, y, None, None, 0.0)])
    KERNELS.backward(regime, tokens, 1, [Gradient(weight, torch.eye(48, dtype=BF16), None, None)], dx)
    assert torch.equal(y.T, w.to(BF16)) and torch.equal(dx, w.to(BF16))


def reference_values(packed: torch.Tensor, absmax: torch.Tensor, block_size: int, n: int, k: int) -> torch.Tensor:
    code = torch.stack([packed >> 4, packed & 15], 1).view(-1).long()
    values = torch.tensor(importlib.import_module("peftk.format.code4").NF4.values)
    return (values[code] * absmax.repeat_interleave(block_size)[: n * k]).view(n, k)


@pytest.mark.parametrize(
    ("n", "k", "rows", "columns"),
    [(70, 384, range(3, 70), range(64, 384)), (40, 320, range(40), range(320)), (21, 90, range(2, 20), range(5, 88))],
)
@pytest.mark.parametrize("dtype,nested", [(BF16, True), (FP32, False)])
def test_decode(n: int, k: int, rows: range, columns: range, dtype: torch.dtype, nested: bool):
    weight, w = weight4(n, k, nested=nested, quant_type="nf4" if nested else "fp4")
    out = poisoned(len(rows), len(columns), dtype=dtype)
    KERNELS.decode(weight, rows, columns, out)
    assert torch.equal(out, w[rows.start : rows.stop, columns.start : columns.stop].to(dtype))
    assert not (out == 0).logical_and(out.signbit()).any(), "zeros are +0"


def test_a_list_is_its_single_calls():
    """Of formats that one launch can't take together, too: those are several, and dx's are further runs."""
    x = torch.randn(12, 192, dtype=BF16)
    formats = [(40, 64, True, "nf4"), (144, 128, True, "nf4"), (3, 64, False, "fp4")]
    weights = [weight4(n, 192, *rest) for n, *rest in formats]

    def outputs() -> list[Output]:
        return [Output(weight, None, poisoned(12, weight.n, dtype=BF16), None, None, 0.0) for weight, _ in weights]

    together, alone = outputs(), outputs()
    KERNELS.forward("tile", 16, x, together)
    for one in alone:
        KERNELS.forward("tile", 16, x, [one])
    assert all(torch.equal(a.y, b.y) for a, b in zip(together, alone, strict=True))
    gradients = [Gradient(weight, torch.randn(12, weight.n).to(BF16), None, None) for weight, _ in weights]
    dx = poisoned(12, 192, dtype=BF16)
    KERNELS.backward("tile", 16, 1, gradients, dx)
    dy, dense = torch.cat([g.dy for g in gradients], 1), torch.cat([w for _, w in weights])
    assert_no_worse_than_twice_plain(dx, dy @ dense.to(BF16), dy.double() @ dense.double())


@pytest.mark.parametrize("product", ["forward", "backward"])
def test_w_is_read_once_and_never_written(product: str):
    """16-byte loads are those of W's codes and of x or dy, which every tile of W reads; look-ups of values don't conflict, but
    the stores of a decoded tile of 128 columns do. A pipeline of 4 stages issues 3 rounds of copies more, of no bytes, which the
    report counts whole."""
    n, k, m, tile, depth = 256, 512, 16, 128, 64
    weight, _ = weight4(n, k)
    x, y, door = torch.randn(m, k, dtype=BF16), torch.randn(m, n, dtype=BF16), PtxDoor(traffic=True)
    with gpu.through("triton", door):
        if product == "forward":
            KERNELS.forward("tile", 16, x, [Output(weight, None, y, None, None, 0.0)])
            rounds, other, out = k // depth, n // tile * x.nbytes, y
        else:
            KERNELS.backward("tile", 16, 1, [Gradient(weight, y, None, None)], x)
            rounds, other, out = n // depth, k // tile * y.nbytes, x
    (report,) = door.reports
    assert 16 * report.accesses["global", "load", 16] * rounds // (rounds + 3) == n * k // 2 + other
    assert report.bytes_stored["global"] == out.nbytes
    assert report.traffic.conflicts < (0.02 if product == "forward" else 0.16) * report.traffic.wavefronts


def test_no_seed_compiles_a_kernel_anew():
    weight, _ = weight4(16, 64)
    t, a, dy, dx = (torch.randn(*size).to(BF16) for size in ((2, 8), (8, 64), (2, 16), (2, 64)))
    counts = []
    for seed in (0, 1, 16, 2**32, 2**31 - 1, 2**63 - 1):
        KERNELS.backward("tile", 16, 1, [Gradient(weight, dy, t, a, 0.1, seed)], dx)
        counts.append(len(DOOR.compiled))
    assert len(set(counts)) == 1
