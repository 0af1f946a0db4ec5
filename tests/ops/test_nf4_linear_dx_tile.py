"""nf4_linear_dx_tile, the tensor-core kernel for dx, at its door: compiled PTX in the emulator, and the source on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from emulation.cuda_host.door import HostDoor, PtxDoor
from numerics import assert_no_worse_than_twice_plain, row_scaled

import peftk
from peftk.format.code4 import CODES4
from peftk.native import NATIVE_DTYPE
from peftk.ops.philox_dropout.reference import philox

BF16, F16 = torch.bfloat16, torch.float16
COLUMNS, STEP = 256, 32  # of a block's tile of W


@pytest.fixture(params=[HostDoor, PtxDoor], ids=["cuda-host", "cuda-ptx"])
def door(request):
    if why := request.param().why_not():
        pytest.skip(why)
    return request.param()


@dataclass
class Gradient:
    """One weight of a list with what meets it; r 0: no low-rank start."""

    n: int
    block_size: int = 64
    quant_type: str = "nf4"
    double_quant: bool = True
    r: int = 0
    p: float = 0.0
    gap: int = 0  # elements between rows of dy beyond what 16 bytes ask for

    def make(self, k: int, m: int, dtype: torch.dtype) -> None:
        w = row_scaled(self.n, k)
        self.w4 = peftk.quantize_nf4(w, self.block_size, double_quant=self.double_quant, quant_type=self.quant_type)
        stride = -(-self.n // 8) * 8 + self.gap
        self.stride = stride
        self.dy = torch.full((m, stride), math.nan, dtype=dtype)[:, : self.n].copy_(torch.randn(m, self.n))
        self.t = torch.randn(m, self.r).to(dtype) if self.r else None
        self.a = torch.randn(self.r, k).to(dtype) if self.r else None
        self.seed = 2**40 + self.n

    def argument(self) -> tuple:
        w4 = self.w4
        weight = (w4.packed, w4.absmax, w4.absmax_scale, w4.absmax_offset, self.n, w4.block_size, CODES4[w4.quant_type].number)
        dropout = (int(self.p * 2**32), 1 / (1 - self.p), self.seed)
        return (weight, self.dy, self.stride, self.t, self.a, self.r, *dropout)

    def mask(self, m: int, k: int) -> torch.Tensor:
        keep = philox(m * k, self.seed, torch.device("cpu")).view(m, k) >= int(self.p * 2**32)
        return keep * torch.tensor(1 / (1 - self.p), dtype=torch.float32).double()

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """In fp64, with the weight as it is; in a 16-bit dtype the plain product, each result rounded."""
        w = self.w4.dequantize(torch.float32 if dtype == torch.float64 else dtype).to(dtype)
        dx = self.dy.to(dtype).contiguous() @ w  # oneDNN on AMX reads what lies between rows, and NaN times a zero is NaN
        if self.r:
            dx = dx + ((self.t.to(dtype) @ self.a.to(dtype)) * self.mask(*dx.shape)).to(dtype)
        return dx


def call(door, gradients: list[Gradient], k: int, m: int, dtype: torch.dtype, tokens: int, split: int = 1) -> torch.Tensor:
    """dx, that lay between elements which nobody may write; it and the partial sums are NaN before."""
    guard, count = 64, m * k
    buffer = torch.full((count + 2 * guard,), math.nan, dtype=dtype)
    dx = buffer[guard : guard + count].view(m, k)
    partial = torch.full((split, m, k), math.nan) if split > 1 else None
    arguments = [gradient.argument() for gradient in gradients]
    door.call("nf4_linear_dx_tile", arguments, k, m, NATIVE_DTYPE[dtype], tokens, split, dx, partial)
    assert buffer[:guard].isnan().all() and buffer[guard + count :].isnan().all()
    return dx


def check(door, gradients: list[Gradient], k: int, m: int, dtype: torch.dtype, tokens: int, split: int = 1) -> torch.Tensor:
    torch.manual_seed(k + m)
    for gradient in gradients:
        gradient.make(k, m, dtype)
    got = call(door, gradients, k, m, dtype, tokens, split)
    truth = sum(gradient.product(torch.float64) for gradient in gradients)
    # Rounded summands would be a poor standard: the sum is rounded once.
    plain = sum(gradient.product(dtype).double() for gradient in gradients).to(dtype)
    assert_no_worse_than_twice_plain(got, plain, truth)
    return got


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 16), (17, 320, 72), (130, 128, 49)], ids=str)
def test_every_instance(door, m, k, n, tokens, dtype):
    check(door, [Gradient(n)], k, m, dtype, tokens)


def test_no_rows(door):
    check(door, [Gradient(8, r=2)], 64, 0, BF16, 16)
    check(door, [Gradient(0), Gradient(0, r=2)], 64, 3, BF16, 16)


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("block_size", [64, 128, 4096])
@pytest.mark.parametrize("quant_type", CODES4)
def test_weights(door, quant_type, block_size, double_quant):
    """n and k that no tile divides: blocks of 4096 begin in the middle of rows."""
    check(door, [Gradient(77, block_size, quant_type, double_quant, gap=8)], 576, 19, BF16, 32)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("r", "tokens", "dtype"), [(1, 16, F16), (5, 128, BF16), (8, 32, BF16), (16, 64, F16), (64, 16, BF16)])
def test_low_rank_start(door, r, tokens, dtype, p):
    check(door, [Gradient(40, r=r, p=p)], 320, tokens + 3, dtype, tokens)


MIXED = [
    Gradient(33, quant_type="fp4", r=8, p=0.5),
    Gradient(64, 128, double_quant=False),
    Gradient(8, r=5),
    Gradient(70, quant_type="fp4", double_quant=False, r=3, p=0.1, gap=16),
    Gradient(0, r=2),
]


@pytest.mark.parametrize(
    ("split", "k", "m", "dtype", "tokens"),
    [(1, 64, 131, F16, 128), (2, 320, 21, BF16, 16), (3, 64, 131, F16, 128), (12, 64, 21, BF16, 32)],
    ids=str,
)
def test_lists_and_splits(door, split, k, m, dtype, tokens):
    """Eight steps: runs begin within a weight, at an fp4 one, and some have none."""
    assert sum(-(-g.n // STEP) for g in MIXED) == 8
    check(door, MIXED, k, m, dtype, tokens, split)


def test_sixteen_weights(door):
    check(door, [Gradient(16 + i, quant_type=("nf4", "fp4")[i % 2], r=i % 3) for i in range(16)], 64, 5, BF16, 16)


def test_same_bits_whatever_the_grid(door):
    """Rows don't depend on the others or on how many tokens a tile has; runs are added in their order."""
    whole = check(door, MIXED, 128, 40, BF16, 32, split=3)
    for tokens in (32, 64):
        assert torch.equal(call(door, MIXED, 128, 40, BF16, tokens, split=3), whole)


@pytest.mark.parametrize("scale", [1e4, 1e-6])
def test_fp16_keeps_the_range_of_a_dense_weight(door, scale):
    gradient = Gradient(48, double_quant=False)
    gradient.make(64, 9, F16)
    gradient.w4.absmax.mul_(scale / gradient.w4.absmax.max())
    gradient.dy.mul_(1e-2 if scale > 1 else 1e2)
    got = call(door, [gradient], 64, 9, F16, 16)
    assert got.isfinite().all()
    assert_no_worse_than_twice_plain(got, gradient.product(F16), gradient.product(torch.float64))


def test_what_is_not_finite_stays_in_its_columns(door):
    gradient = Gradient(40, double_quant=False)
    gradient.make(192, 17, BF16)
    gradient.w4.absmax[3 * 5 + 1] = math.nan  # row 5, columns 64 to 127
    got = call(door, [gradient], 192, 17, BF16, 16)
    assert got[:, 64:128].isnan().all() and got[:, :64].isfinite().all() and got[:, 128:].isfinite().all()


@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
def test_memory(tokens):
    """Packed bytes are read once by a tile's tokens, dy once by its columns, nothing but dx is written; no bank conflicts."""
    door = PtxDoor(traffic=True)
    if why := door.why_not():
        pytest.skip(why)
    n, k, m = 3 * STEP, COLUMNS, tokens
    for double_quant in (True, False):
        gradient = Gradient(n, double_quant=double_quant)
        gradient.make(k, m, BF16)
        call(door, [gradient], k, m, BF16, tokens)
        ((_, report),) = door.reports
        moved = {
            width: count * width for (space, way, width), count in report.accesses.items() if (space, way) == ("global", "load")
        }
        assert moved[16] == n * k // 2 + m * n * 2
        assert moved.get(1, 0) == (n * k // 64 if double_quant else 0)
        assert report.bytes_stored["global"] == m * k * 2
        assert (
            double_quant or report.traffic.conflicts == 0
        )  # which of the 8-bit code's values lanes look up is the data's affair


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 96}, "k: expected a multiple of 64, got 96"),
        ({"dtype": 0}, "dtype: expected 1 .bf16. or 2 .fp16., got 0"),
        ({"tokens": 24}, "tokens: expected 16, 32, 64 or 128, got 24"),
        ({"split": 0}, "split: expected 1 to 65535, got 0"),
        ({"block_size": 32}, "block_size: expected a multiple of 64, got 32"),
        ({"quant_type": 2}, "quant_type: expected 0 .nf4. or 1 .fp4., got 2"),
        ({"stride": 12}, "dy: expected rows that are a multiple of 8 elements apart, got 12"),
        ({"count": 17}, "a list of weights: expected 1 to 16"),
        ({"n": 2**30}, "n: expected less than 2.30, got 1073741824"),
    ],
)
def test_refusals(change, message):
    door = HostDoor()
    if why := door.why_not():
        pytest.skip(why)
    given = {
        "k": 64,
        "dtype": 1,
        "tokens": 16,
        "split": 1,
        "block_size": 64,
        "quant_type": 0,
        "stride": 8,
        "count": 1,
        "n": 8,
    } | change
    space = torch.zeros(4096, dtype=torch.uint8)
    weight = (space, space, None, None, given["n"], given["block_size"], given["quant_type"])
    gradients = [(weight, space, given["stride"], None, None, 0, 0, 1.0, 0)] * given["count"]
    with pytest.raises(ValueError, match=message):
        door.call("nf4_linear_dx_tile", gradients, given["k"], 2, given["dtype"], given["tokens"], given["split"], space, None)
