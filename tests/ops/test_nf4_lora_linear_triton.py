"""nf4_lora_linear's Triton kernels for thin products, S = D(z) A^T, T = scale dy B, dA = T^T D(z), dB = scale dy^T S: by PTX in
the emulator, against fp64."""

from __future__ import annotations

import mmap
from dataclasses import replace

import pytest
import torch
from emulation import doors
from emulation.triton_door import PtxDoor
from numerics import assert_no_worse_than_twice_plain

from peftk.ops import gpu
from peftk.ops.gpu_product import Outer, Shrink
from peftk.ops.philox_dropout.reference import philox

if why := doors.why_not("triton-ptx"):
    pytest.skip(why, allow_module_level=True)

from peftk.ops.nf4_lora_linear import triton_thin

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16, FP16]
GUARD = -7.0  # around every output


@pytest.fixture(autouse=True)
def door():
    with gpu.through("triton", doors.door("triton-ptx")):
        yield doors.door("triton-ptx")


def matrix(rows: int, columns: int, dtype: torch.dtype, stride: int | None = None) -> torch.Tensor:
    """Gaussian, with its own distance from row to row; what lies between rows is NaN."""
    stride = stride or columns
    whole = torch.full((rows, stride), float("nan"), dtype=dtype)
    whole[:, :columns] = torch.randn(rows, columns)
    return whole[:, :columns]


def guarded(rows: int, columns: int, dtype: torch.dtype, transposed: bool = False) -> torch.Tensor:
    """A poisoned matrix between guards, which ``untouched`` looks at."""
    buffer = torch.full((rows * columns + 32,), GUARD, dtype=dtype)
    inside = buffer[16:-16].fill_(float("nan"))
    return inside.view(columns, rows).t() if transposed else inside.view(rows, columns)


def untouched(out: torch.Tensor) -> bool:
    return bool((torch.as_strided(out, (2, 16), (out.numel() + 16, 1), 0) == GUARD).all())


def shrunk(wide, factor, scale=0.7, dropout=0.0, seed=0) -> Shrink:
    return Shrink(wide, factor, scale, dropout, seed, guarded(wide.shape[0], factor.shape[1], wide.dtype))


def outered(thin, wide, scale=0.7, dropout=0.0, seed=0, dtype=None, transposed=False) -> Outer:
    out = guarded(thin.shape[1], wide.shape[1], dtype or wide.dtype, transposed)
    return Outer(thin, wide, scale, dropout, seed, out)


def masked(p: Shrink | Outer) -> torch.Tensor:
    """D(wide) in fp64."""
    if not p.dropout:
        return p.wide.double()
    kept = philox(p.wide.numel(), p.seed, p.wide.device) >= int(p.dropout * 2**32)
    return torch.where(kept.view(p.wide.shape), p.wide.double() / (1 - p.dropout), 0.0)


def check(*products: Shrink | Outer) -> None:
    """Every result against fp64, beside the plain product in its dtype, summed in three orders."""
    run = triton_thin.shrink if isinstance(products[0], Shrink) else triton_thin.outer
    run(list(products))
    for p in products:
        left, right = (masked(p), p.factor) if isinstance(p, Shrink) else (p.thin.t(), masked(p))
        truth = left.double() @ right.double() * p.scale
        dtype, terms = p.wide.dtype, right.shape[0]
        orders = [torch.arange(terms), torch.randperm(terms), torch.randperm(terms)]
        plain = [(left[:, o].to(dtype) @ right[o].to(dtype) * p.scale).to(p.out.dtype) for o in orders]
        assert_no_worse_than_twice_plain(p.out, plain, truth)
        assert untouched(p.out)


# m, c, r, dtype, dropout, whether the factor is B (c, r) rather than A^T, what lies between two rows of wide: every tile, both
# ways to make a mask, one run and several of either dimension, every place where a tile isn't full.
CASES = [
    (1, 320, 16, BF16, 0.0, False, 0),
    (5, 200, 8, BF16, 0.3, True, 8),
    (70, 264, 5, FP16, 0.3, False, 0),
    (33, 131, 1, BF16, 0.3, False, 1),
    (150, 192, 64, BF16, 0.5, False, 64),
    (17, 96, 16, FP32, 0.25, True, 0),
    (70, 140, 40, FP32, 0.0, False, 4),
    (20, 136, 130, FP16, 0.0, True, 0),
]


@pytest.mark.parametrize("m,c,r,dtype,dropout,by_rank,between", CASES)
def test_shrink(m, c, r, dtype, dropout, by_rank, between):
    factor = matrix(c, r, dtype) if by_rank else matrix(r, c, dtype).t()
    check(shrunk(matrix(m, c, dtype, c + between), factor, dropout=dropout, seed=2**63 - 12345))


@pytest.mark.parametrize("m,c,r,dtype,dropout,by_rank,between", CASES)
def test_outer(m, c, r, dtype, dropout, by_rank, between):
    out = {"dtype": FP32, "transposed": True} if by_rank else {}
    check(outered(matrix(m, r, dtype), matrix(m, c, dtype, c + between), -3.0, dropout, 2**63 - 12345, **out))


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 8, 16, 33, 64, 128, 200])
@pytest.mark.parametrize("m,c", [(3, 520), (16, 64), (130, 200), (300, 132), (65, 67)])
def test_everything(m, c, r, dtype):
    wide = matrix(m, c, dtype, c + r % 2 * 8)
    for dropout in (0.0, 0.2):
        check(shrunk(wide, matrix(r, c, dtype).t(), 1.0, dropout, r), shrunk(wide, matrix(c, r, dtype), 2.0, dropout, m))
        for out in DTYPES:
            thin = matrix(m, r, dtype)
            check(outered(thin, wide, 1.0, dropout, r, out), outered(thin, wide, 1.0, dropout, r, out, transposed=True))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("m,c", [(16, 48), (7, 35)])
def test_the_mask_bit_for_bit(m, c, dtype):
    """A product with the identity is D(wide), rounded once. 35 columns: no row but the first starts at a multiple of four."""
    wide, seed = matrix(m, c, dtype, c + 8 * (c % 8 == 0)), 2**40 + 5
    kept = (philox(m * c, seed, wide.device) >= int(0.3 * 2**32)).view(m, c)
    expected = torch.where(kept, wide.float() * torch.tensor(1 / 0.7), torch.zeros(())).to(dtype)
    s, da = shrunk(wide, torch.eye(c, dtype=dtype).t(), 1.0, 0.3, seed), outered(torch.eye(m, dtype=dtype), wide, 1.0, 0.3, seed)
    triton_thin.shrink([s])
    triton_thin.outer([da])
    assert torch.equal(s.out, expected) and torch.equal(da.out, expected)


def test_unaligned_and_strided():
    """What no 16-byte access takes: rows on odd addresses, a factor with two strides of its own, a result with gaps."""
    shifted = matrix(9, 65, BF16, 72)[:, 1:]
    check(shrunk(shifted, matrix(64, 10, BF16)[:, ::2]), shrunk(shifted, matrix(128, 6, BF16)[::2, 1:]))
    whole, gaps = torch.full((8, 192), GUARD), torch.ones(8, 192, dtype=torch.bool)
    p, gaps[2:5, ::3] = outered(matrix(9, 3, BF16), shifted, dtype=FP32), False
    triton_thin.outer([p, replace(p, out=whole[2:5, ::3])])
    assert torch.equal(whole[2:5, ::3], p.out) and (whole[gaps] == GUARD).all()


def test_a_list_is_its_single_calls_bit_for_bit():
    x, dy = matrix(40, 320, BF16), matrix(40, 200, BF16, 208)
    shrinks = [(x, matrix(16, 320, BF16).t(), 1.0, 0.25, 9), (dy, matrix(200, 8, BF16), 0.5, 0.0, 0)]
    outers = [(matrix(40, 16, BF16), x, 1.0, 0.25, 9), (matrix(40, 8, BF16), dy, 0.5, 0.0, 0)]
    for run, make, facts in ((triton_thin.shrink, shrunk, shrinks), (triton_thin.outer, outered, outers)):
        together, single = [make(*one) for one in facts], [make(*one) for one in facts]
        run(together)
        for one, other in zip(single, together, strict=True):
            run([one])
            assert torch.equal(one.out, other.out)


@pytest.mark.parametrize("runs", [1, 32])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_long_sums(dtype, runs, monkeypatch):
    """Thousands of terms, more of one sign."""
    monkeypatch.setattr(triton_thin, "MOST_RUNS", runs)
    wide = (torch.randn(16, 2048) + 1).to(dtype)
    check(shrunk(wide, matrix(16, 2048, dtype).t()))
    check(outered(matrix(2048, 8, dtype), wide.view(2048, 16), dtype=FP32))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_no_rows(dtype):
    """S is empty, and gradients are zero."""
    check(shrunk(matrix(0, 64, dtype), matrix(16, 64, dtype).t()))
    p = outered(matrix(0, 16, dtype), matrix(0, 64, dtype))
    triton_thin.outer([p])
    assert torch.equal(p.out, torch.zeros(16, 64, dtype=dtype)) and untouched(p.out)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_what_is_not_finite_stays_where_it_is(dtype):
    """Padding is made of zeros, and no row or column stands in for another in a result."""
    wide, factor, thin = matrix(19, 72, dtype), matrix(5, 72, dtype).t(), matrix(19, 5, dtype)
    wide[4, 70], wide[18, 3] = float("inf"), float("nan")
    s, da = shrunk(wide, factor), outered(thin, wide)
    triton_thin.shrink([s])
    triton_thin.outer([da])
    assert (
        (~s.out.isfinite()).any(1).nonzero().view(-1).tolist() == [4, 18] and s.out[4].isinf().all() and s.out[18].isnan().all()
    )
    assert (~da.out.isfinite()).any(0).nonzero().view(-1).tolist() == [3, 70] and da.out[:, 70].isinf().all()


def test_what_is_dropped_is_gone_even_where_it_is_not_finite():
    wide, seed = matrix(6, 64, BF16), 77
    kept = (philox(wide.numel(), seed, wide.device) >= int(0.5 * 2**32)).view(wide.shape)
    wide[~kept] = float("nan")
    s, da = shrunk(wide, matrix(16, 64, BF16).t(), 1.0, 0.5, seed), outered(matrix(6, 16, BF16), wide, 1.0, 0.5, seed)
    triton_thin.shrink([s])
    triton_thin.outer([da])
    assert s.out.isfinite().all() and da.out.isfinite().all()


def test_offsets_beyond_32_bits():
    """Rows that are 2^31 elements apart, in a sparse mapping."""
    stride = 2**31 + 8
    wide = torch.frombuffer(mmap.mmap(-1, 2 * (stride + 64)), dtype=BF16).as_strided((2, 64), (stride, 1))
    wide.copy_(torch.randn(2, 64))
    check(shrunk(wide, matrix(16, 64, BF16).t()))
    check(outered(matrix(2, 16, BF16), wide))


@pytest.mark.parametrize("r", [16, 128])
def test_the_wide_matrix_is_read_once(r):
    """A factor is read for each tile's rows (64, or 128 beyond 32 ranks), a thin matrix for each 128 columns."""
    m, c = 128, 256
    x, a, thin = matrix(m, c, BF16), matrix(r, c, BF16).t(), matrix(m, r, BF16)
    door = PtxDoor(traffic=True)
    with gpu.through("triton", door):
        triton_thin.shrink([shrunk(x, a)])
        triton_thin.outer([outered(thin, x)])
    kernels = [report for report in door.reports if any(name.startswith("mma") for name in report.instructions)]
    for report, narrow in zip(kernels, (a.nbytes * m // (64 if r <= 32 else 128), thin.nbytes * c // 128), strict=True):
        assert report.traffic.sectors * 32 == x.nbytes + narrow + report.bytes_stored["global"]
