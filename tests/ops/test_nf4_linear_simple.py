"""The CUDA kernels that take every shape, nf4_linear_{simple, dx_simple, decode}: as fibers on the host, and as PTX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from emulation import doors
from emulation.cuda_host.door import PtxDoor
from emulation.ptx.memory import AddressSpace
from numerics import assert_no_worse_than_twice_plain, row_scaled

import peftk
from peftk.format.code4 import BLOCK_SIZES, code4
from peftk.native import NATIVE_DTYPE
from peftk.ops.philox_dropout.reference import philox

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cuda-host", "cuda-ptx"])
def door(request: pytest.FixtureRequest) -> Any:
    if reason := doors.why_not(request.param):
        pytest.skip(reason)
    return doors.door(request.param)


def wired(w4: peftk.NF4Weight) -> tuple:
    """Weight4 of csrc/format/weight4.h."""
    return (*w4.tensors(), w4.shape[0], w4.block_size, code4(w4.quant_type).number)


def quantized(n: int, k: int, block_size: int = 64, quant_type: str = "nf4", double_quant: bool = True) -> peftk.NF4Weight:
    if block_size in BLOCK_SIZES:
        return peftk.quantize_nf4(row_scaled(n, k), block_size, double_quant, quant_type=quant_type)
    packed = torch.randint(0, 256, ((n * k + 1) // 2,), dtype=torch.uint8)  # what no quantiser makes, but the kernels take
    absmax = torch.rand(-(-n * k // block_size)) + 0.5
    return peftk.NF4Weight(packed, absmax, None, None, (n, k), torch.float32, block_size, quant_type)


def guarded(m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """(m + 2, n) of NaN: a kernel gets the rows between the first and the last, which stay what they are."""
    return torch.full((m + 2, n), float("nan"), dtype=dtype)


@dataclass
class Branch:
    """A low-rank start: thin (m, r), wide (n | k, r), and what becomes of their product."""

    thin: torch.Tensor
    wide: torch.Tensor
    scale: float = 1.0
    dropout: float = 0.0
    seed: int = 0

    @staticmethod
    def random(m: int, wide: int, r: int, dtype: torch.dtype, **others: float) -> Branch:
        return Branch(torch.randn(m, r).to(dtype), torch.randn(wide, r).to(dtype), **others)

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        product = self.scale * (self.thin.to(dtype) @ self.wide.to(dtype).T)
        if not self.dropout:
            return product
        keep = philox(product.numel(), self.seed, product.device).view(product.shape) >= int(self.dropout * 2**32)
        return torch.where(keep, product / (1 - self.dropout), 0.0)


@dataclass
class One:
    """One of a list's products."""

    w4: peftk.NF4Weight
    branch: Branch | None = None
    bias: torch.Tensor | None = None
    split: int = 1
    dy: torch.Tensor | None = None


def forward(door: Any, x: torch.Tensor, ones: list[One]) -> list[torch.Tensor]:
    m, k = x.shape
    held = [guarded(m, one.w4.shape[0], x.dtype) for one in ones]
    outputs = []
    for one, y in zip(ones, held, strict=True):
        branch = (
            (one.branch.thin, one.branch.wide, one.branch.thin.shape[1], one.branch.scale) if one.branch else (None, None, 0, 0.0)
        )
        outputs.append((wired(one.w4), one.bias, y[1:-1], *branch, one.split))
    count = sum(one.split * m * one.w4.shape[0] for one in ones if one.split > 1)
    partial = torch.full((count,), float("nan")) if count else None
    door.call("nf4_linear_simple", outputs, k, x, x.stride(0), m, NATIVE_DTYPE[x.dtype], partial)
    assert all(y[0].isnan().all() and y[-1].isnan().all() for y in held)
    return [y[1:-1] for y in held]


def backward(door: Any, m: int, k: int, ones: list[One], split: int = 1) -> torch.Tensor:
    dtype = ones[0].dy.dtype
    gradients = []
    for one in ones:
        branch = (None, None, 0, 0, 1.0, 0)
        if b := one.branch:
            branch = (b.thin, b.wide.T.contiguous(), b.thin.shape[1], int(b.dropout * 2**32), 1 / (1 - b.dropout), b.seed)
        gradients.append((wired(one.w4), one.dy, one.dy.stride(0), *branch))
    dx, partial = guarded(m, k, dtype), torch.full((split, m, k), float("nan")) if split > 1 else None
    door.call("nf4_linear_dx_simple", gradients, k, m, NATIVE_DTYPE[dtype], split, dx[1:-1], partial)
    assert dx[0].isnan().all() and dx[-1].isnan().all()
    return dx[1:-1]


def y_of(x: torch.Tensor, one: One, dtype: torch.dtype) -> torch.Tensor:
    """In ``dtype``: the truth in fp64, a plain product in x's, with the weight as a plain product has it."""
    w = one.w4.dequantize(torch.float32 if dtype == torch.float64 else dtype).to(dtype)
    y = x.to(dtype) @ w.T
    y = y if one.branch is None else y + one.branch.product(dtype)
    return y if one.bias is None else y + one.bias.to(dtype)


def dx_of(ones: list[One], dtype: torch.dtype) -> torch.Tensor:
    total = 0
    for one in ones:
        w = one.w4.dequantize(torch.float32 if dtype == torch.float64 else dtype).to(dtype)
        total = total + one.dy.to(dtype) @ w + (0 if one.branch is None else one.branch.product(dtype))
    return total


# ---- decode -----------------------------------------------------------------------------------------------------------------

# n, k, block, then rows and columns: tiles that overlap, a tile alone, and what only the general path takes
CHUNKS = [
    (40, 640, 64, (3, 37), (128, 640)),
    (16, 256, 256, (0, 16), (0, 256)),
    (21, 448, 4096, (1, 18), (64, 448)),
    (9, 128, 64, (2, 5), (64, 128)),
    (13, 77, 32, (4, 13), (5, 70)),
    (6, 96, 64, (0, 6), (0, 96)),
    (33, 33, 128, (0, 33), (0, 33)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CHUNKS, ids=str)
def test_a_chunk_is_what_dequantize_gives(door, case, dtype):
    n, k, block_size, rows, columns = case
    for quant_type, double_quant in (("nf4", True), ("fp4", False)):
        w4 = quantized(n, k, block_size, quant_type, double_quant)
        out = torch.full((rows[1] - rows[0] + 2, columns[1] - columns[0]), float("nan"), dtype=dtype)
        extent = (rows[0], rows[1] - rows[0], columns[0], columns[1] - columns[0])
        door.call("nf4_linear_decode", wired(w4), k, *extent, out[1:-1], NATIVE_DTYPE[dtype])
        assert torch.equal(out[1:-1], w4.dequantize(dtype)[slice(*rows), slice(*columns)])
        assert out[0].isnan().all() and out[-1].isnan().all()


def test_a_chunk_with_tiny_scales_and_on_odd_addresses(door):
    """Products that round to zero are +0; codes and results where no wide access may go."""
    w4 = quantized(16, 256, double_quant=False)
    w4.absmax.copy_(torch.tensor([-1e-45, 1e-40, 3e-39, -0.0]).repeat(16))
    shifted = torch.cat([w4.packed.view(-1)[:1], w4.packed.view(-1)])[1:]
    for packed, first in ((w4.packed, 0), (w4.packed, 1), (shifted, 0)):
        out = torch.full((16 * 256 + 8,), float("nan"))[first : first + 16 * 256].view(16, 256)
        door.call("nf4_linear_decode", (packed, *wired(w4)[1:]), 256, 0, 16, 0, 256, out, NATIVE_DTYPE[torch.float32])
        assert torch.equal(out, w4.dequantize()) and torch.equal(out.signbit(), w4.dequantize().signbit())


@pytest.mark.parametrize("door", ["cuda-ptx"], indirect=True)  # the host counts no bytes
def test_a_chunk_reads_each_byte_once(door):
    w4 = quantized(64, 1024, double_quant=False)
    out = torch.empty(32, 512, dtype=torch.bfloat16)
    door.call("nf4_linear_decode", wired(w4), 1024, 16, 32, 256, 512, out, NATIVE_DTYPE[out.dtype])
    ((_, report),) = door.reports
    words, scales = 32 * 512 // 8, 32 * 512 // 64
    table = report.threads // 1024 * 256 * 16 * 3  # parameters that are indexed count as global memory
    assert report.accesses["global", "load", 4] == words + scales + table
    assert report.bytes_loaded["global"] == 4 * report.accesses["global", "load", 4]
    assert report.bytes_stored["global"] == out.nbytes and report.wide_share("global", "store") == 1


# ---- products ---------------------------------------------------------------------------------------------------------------


def covering(cases: list[tuple]) -> list[tuple]:
    """Each case in fp32 and in one of the 16-bit types, in turn."""
    return [(case, dtype) for i, case in enumerate(cases) for dtype in (DTYPES[0], DTYPES[1 + i % 2])]


# m, n, k, block, quant type, double quantised, r, split. Tiles are 8 rows (m ≤ 32) or 64 rows by 64 columns, steps 32 deep.
FORWARD = [
    (1, 65, 200, 64, "nf4", True, 0, 1),
    (3, 33, 77, 32, "nf4", True, 5, 2),
    (8, 64, 256, 64, "fp4", False, 8, 1),
    (9, 130, 129, 64, "nf4", False, 1, 3),
    (33, 70, 333, 128, "nf4", True, 16, 2),
    (65, 17, 96, 4096, "fp4", True, 64, 1),
    (2, 5, 20, 16, "nf4", False, 0, 1),
    (64, 64, 31, 64, "nf4", True, 33, 1),
]


@pytest.mark.parametrize(("case", "dtype"), covering(FORWARD), ids=str)
def test_forward(door, case, dtype):
    m, n, k, block_size, quant_type, double_quant, r, split = case
    x = torch.randn(m, k + 3).to(dtype)[:, 1 : k + 1]
    branch = Branch.random(m, n, r, dtype, scale=0.7) if r else None
    one = One(quantized(n, k, block_size, quant_type, double_quant), branch, torch.randn(n).to(dtype) if n % 2 else None, split)
    (y,) = forward(door, x, [one])
    assert_no_worse_than_twice_plain(y, y_of(x, one, dtype), y_of(x, one, torch.float64))


# m, k, block, quant type, double quantised, then n, r and p of each weight, and split
BACKWARD = [
    (1, 200, 64, "nf4", True, [(65, 0, 0.0)], 1),
    (3, 77, 32, "nf4", True, [(33, 5, 0.3)], 2),
    (8, 256, 64, "fp4", False, [(40, 8, 0.5), (70, 16, 0.1), (5, 0, 0.0)], 3),
    (40, 129, 64, "nf4", False, [(130, 1, 0.0), (31, 33, 0.25)], 4),
    (65, 96, 4096, "fp4", True, [(17, 64, 0.9)], 1),
    (2, 20, 16, "nf4", False, [(5, 3, 0.4)], 9),
]


@pytest.mark.parametrize(("case", "dtype"), covering(BACKWARD), ids=str)
def test_backward(door, case, dtype):
    m, k, block_size, quant_type, double_quant, weights, split = case
    ones = []
    for seed, (n, r, p) in enumerate(weights, 5):
        branch = Branch.random(m, k, r, dtype, dropout=p, seed=seed << 32 | 77) if r else None
        dy = torch.randn(m, n + 1).to(dtype)[:, :n]
        ones.append(One(quantized(n, k, block_size, quant_type, double_quant), branch, dy=dy))
    dx = backward(door, m, k, ones, split)
    assert_no_worse_than_twice_plain(dx, dx_of(ones, dtype), dx_of(ones, torch.float64))


def test_a_long_sum_is_as_exact_as_a_plain_product(door):
    """Which one fp32 sum of 4096 products is not."""
    x, one = torch.randn(33, 4096), One(quantized(8, 4096))
    (y,) = forward(door, x, [one])
    assert_no_worse_than_twice_plain(y, y_of(x, one, torch.float32), y_of(x, one, torch.float64))


def test_a_list_gives_what_single_calls_give(door):
    """Splits, formats, blocks, biases and branches of their own: the same bits; and again the same."""
    m, k, dtype = 5, 150, torch.bfloat16
    x = torch.randn(m, k).to(dtype)
    ones = [
        One(quantized(70, k), Branch.random(m, 70, 5, dtype, scale=2.0), None, 2),
        One(quantized(3, k, 32, "fp4", False), None, torch.randn(3).to(dtype)),
        One(quantized(64, k, 128), Branch.random(m, 64, 8, dtype), torch.randn(64).to(dtype), 3),
        One(quantized(65, k, 64, double_quant=False)),
    ]
    together, again = forward(door, x, ones), forward(door, x, ones)
    for one, y, repeated in zip(ones, together, again, strict=True):
        assert torch.equal(y, forward(door, x, [one])[0]) and torch.equal(y, repeated)


@pytest.mark.parametrize("k", [64, 35])
def test_what_is_not_finite_spoils_its_own_row(door, k):
    """Of y, where a constant is; of x and y, where an input is. k = 35: the bad block begins inside a row."""
    w4 = quantized(40, k, double_quant=False)
    clean, x = One(w4), torch.randn(3, k)
    w4.absmax[7] = float("inf")
    rows = sorted({i // k for i in range(7 * 64, 8 * 64)})
    x[1, 5] = float("nan")
    (y,) = forward(door, x, [clean])
    bad = torch.zeros(3, 40, dtype=torch.bool)
    bad[1], bad[:, rows] = True, True
    assert torch.equal(~y.isfinite(), bad)


def test_no_rows_and_no_columns(door):
    one, none = One(quantized(9, 64)), One(quantized(0, 64))
    assert forward(door, torch.randn(0, 64), [one])[0].shape == (0, 9)
    x = torch.randn(2, 64)
    assert torch.equal(forward(door, x, [none, one])[1], forward(door, x, [one])[0])
    one.dy, none.dy = torch.randn(2, 9), torch.randn(2, 0)
    none.branch = Branch.random(2, 64, 3, torch.float32)
    dx = backward(door, 2, 64, [none, one])
    torch.testing.assert_close(dx.double(), dx_of([none, one], torch.float64), rtol=1e-5, atol=1e-5)


def test_a_list_is_no_longer_than_a_launch_takes(door):
    x, one = torch.randn(1, 64), One(quantized(1, 64))
    with pytest.raises(ValueError, match="a list of weights: expected 1 to 16, got 17"):
        forward(door, x, [one] * 17)


@pytest.mark.parametrize("k", [256, 77])
@pytest.mark.parametrize("m", [8, 64])
def test_bytes_and_banks(m, k, monkeypatch):
    """A tile of rows reads packed bytes once (k = 77: a word that begins inside a byte shares it with the one before) and writes
    none; no access conflicts in shared memory."""
    door = PtxDoor(traffic=True)
    if reason := door.why_not():
        pytest.skip(reason)
    n, read, load = 64, [], AddressSpace.load
    w4 = quantized(n, k, double_quant=False)
    before = w4.packed.clone()
    first, end = w4.packed.data_ptr(), w4.packed.data_ptr() + w4.packed.numel()

    def counting(self: AddressSpace, lanes: Any, address: Any, size: int) -> Any:
        read.append(size * int(((address >= first) & (address < end)).sum()))
        return load(self, lanes, address, size)

    monkeypatch.setattr(AddressSpace, "load", counting)
    shared_bytes = 0 if k % 8 == 0 else sum((row * k + word) % 2 for row in range(n) for word in range(0, k, 8))
    for call in (
        lambda: forward(door, torch.randn(m, k).bfloat16(), [One(w4)]),
        lambda: backward(door, m, k, [One(w4, dy=torch.randn(m, n).bfloat16())]),
    ):
        read.clear()
        call()
        ((_, report),) = door.reports
        assert w4.packed.numel() <= sum(read) <= w4.packed.numel() + shared_bytes + n
        assert report.traffic.conflicts == 0 and torch.equal(w4.packed, before)
