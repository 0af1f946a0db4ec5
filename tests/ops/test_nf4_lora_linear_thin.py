"""nf4_lora_linear's CUDA kernels for thin products, S = D(z) A^T, T = scale dy B, dA = T^T D(z), dB = scale dy^T S: against fp64,
as source on the host and as compiled PTX."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from emulation.cuda_host.door import HostDoor, PtxDoor, host_module
from numerics import assert_no_worse_than_twice_plain

from peftk.native import NATIVE_DTYPE
from peftk.ops.philox_dropout.reference import philox

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = DTYPES[1:]
GUARD = -7.0  # around every output


@pytest.fixture(params=[HostDoor, PtxDoor], ids=["cuda-host", "cuda-ptx"])
def door(request: pytest.FixtureRequest):
    made = request.param()
    if why := made.why_not():
        pytest.skip(why)
    return made


@pytest.fixture
def before_sm80():
    """Launchers take the kernels for GPUs without these tensor cores."""
    host_module().set_capability(75)
    yield
    host_module().set_capability(80)


@dataclass(frozen=True)
class Product:
    """One of a list: out = scale * D(wide) thin (shrink), or scale * thin^T D(wide) (outer)."""

    wide: torch.Tensor
    thin: torch.Tensor
    scale: float = 1.0
    dropout: float = 0.0
    seed: int = 0
    out_dtype: torch.dtype | None = None  # of outer: wide's where None
    transposed: bool = False  # of outer: the result's columns are contiguous

    @property
    def masked(self) -> torch.Tensor:
        """D(wide) in fp64."""
        wide = self.wide.double()
        if not self.dropout:
            return wide
        kept = philox(wide.numel(), self.seed, wide.device) >= int(self.dropout * 2**32)
        return torch.where(kept.view(wide.shape), wide / (1 - self.dropout), 0.0)

    @property
    def randomness(self) -> tuple[int, float, int]:
        return int(self.dropout * 2**32), 1 / (1 - self.dropout), self.seed


def guarded(rows: int, columns: int, dtype: torch.dtype, transposed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """A poisoned matrix, and the guards before and behind it."""
    buffer = torch.full((rows * columns + 32,), GUARD, dtype=dtype)
    inside = buffer[16:-16].fill_(float("nan"))
    out = inside.view(columns, rows).t() if transposed else inside.view(rows, columns)
    return out, torch.as_strided(buffer, (2, 16), (rows * columns + 16, 1))


def shrink(door, products: list[Product], split: int = 1) -> list[torch.Tensor]:
    m, dtype = products[0].wide.shape[0], products[0].wide.dtype
    outs = [guarded(m, p.thin.shape[1], dtype) for p in products]
    wired = [
        (p.wide, p.wide.stride(0), p.wide.shape[1], p.thin, *p.thin.stride(), p.thin.shape[1], p.scale, *p.randomness, out)
        for p, (out, _) in zip(products, outs, strict=True)
    ]
    return called(door, "nf4_lora_linear_shrink", wired, outs, m, dtype, split)


def outer(door, products: list[Product], split: int = 1) -> list[torch.Tensor]:
    m, dtype = products[0].wide.shape[0], products[0].wide.dtype
    outs = [guarded(p.thin.shape[1], p.wide.shape[1], p.out_dtype or dtype, p.transposed) for p in products]
    wired = [
        (p.thin, p.thin.shape[1], p.wide, p.wide.stride(0), p.wide.shape[1], p.scale, *p.randomness, out, *out.stride(),
         NATIVE_DTYPE[out.dtype])
        for p, (out, _) in zip(products, outs, strict=True)
    ]  # fmt: skip
    return called(door, "nf4_lora_linear_outer", wired, outs, m, dtype, split)


def called(door, function: str, wired: list[tuple], outs: list, m: int, dtype: torch.dtype, split: int) -> list[torch.Tensor]:
    sums = torch.empty(split * sum(out.numel() for out, _ in outs)) if split > 1 else None
    door.call(function, wired, m, NATIVE_DTYPE[dtype], split, sums)
    assert all((guard == GUARD).all() for _, guard in outs)
    return [out for out, _ in outs]


def check(run, door, products: list[Product], split: int = 1) -> None:
    """Every result against fp64, beside the plain product in its dtype."""
    for product, got in zip(products, run(door, products, split), strict=True):
        left, right = (product.masked, product.thin) if run is shrink else (product.thin.t(), product.masked)
        truth = left.double() @ right.double() * product.scale
        left, right = (side.to(product.wide.dtype).contiguous() for side in (left, right))  # MKL counts strides in 32 bits
        plain = (left @ right * product.scale).to(got.dtype)
        assert_no_worse_than_twice_plain(got, plain, truth)


def matrix(rows: int, columns: int, dtype: torch.dtype, stride: int | None = None) -> torch.Tensor:
    """Gaussian, with its own distance from row to row; what lies between rows is NaN."""
    stride = stride or columns
    whole = torch.full((rows, stride), float("nan"), dtype=dtype)
    whole[:, :columns] = torch.randn(rows, columns)
    return whole[:, :columns]


def by_columns(c: int, r: int, dtype: torch.dtype) -> torch.Tensor:
    """A factor (c, r) that is A^T."""
    return matrix(r, c, dtype).t()


# m, c, r: every instance of the kernels; dtypes take turns, bf16 has all of them.
SHAPES = [
    (1, 64, 16),
    (3, 80, 1),
    (17, 200, 5),
    (33, 136, 8),
    (65, 96, 20),
    (130, 200, 40),
    (64, 72, 64),
    (5, 88, 100),
    (7, 264, 33),
]
CASES = [(*shape, dtype) for i, shape in enumerate(SHAPES) for dtype in (torch.bfloat16, DTYPES[i % 2 * 2])]


@pytest.mark.parametrize("m,c,r,dtype", CASES)
def test_shrink(door, m, c, r, dtype):
    split = 1 + r % 3
    check(shrink, door, [Product(matrix(m, c, dtype, c + 8 * (m % 2)), by_columns(c, r, dtype), scale=0.7)], split)
    check(shrink, door, [Product(matrix(m, c, dtype), matrix(c, r, dtype), scale=-3.0)], split)


@pytest.mark.parametrize("m,c,r,dtype", CASES)
def test_outer(door, m, c, r, dtype):
    split = 1 + r % 3
    check(outer, door, [Product(matrix(m, c, dtype, c + 8 * (m % 2)), matrix(m, r, dtype), scale=0.7)], split)
    check(outer, door, [Product(matrix(m, c, dtype), matrix(m, r, dtype), out_dtype=torch.float32, transposed=True)], split)


@pytest.mark.parametrize("run", [shrink, outer])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("m,c,r,stride", [(9, 33, 5, 33), (70, 64, 16, 65), (3, 130, 8, 136), (20, 40, 18, 47)])
def test_odd_shapes_and_strides(door, run, m, c, r, stride, dtype):
    """What 128-bit loads can't take."""
    for split in (1, 2):
        thin = matrix(m, r, dtype) if run is outer else by_columns(c, r, dtype)
        check(run, door, [Product(matrix(m, c, dtype, stride), thin)], split)
    shifted = matrix(m, 8 * (c // 8) + 1, dtype, 8 * (c // 8) + 8)[:, 1:]
    thin = matrix(m, r, dtype) if run is outer else matrix(shifted.shape[1], r + 1, dtype)[:, :r]
    check(run, door, [Product(shifted, thin)])


@pytest.mark.parametrize("run", [shrink, outer])
@pytest.mark.parametrize("dtype", HALVES)
def test_before_sm80(door, before_sm80, run, dtype):
    wide = matrix(67, 72, dtype)
    for r in (3, 24):
        thin = matrix(67, r, dtype) if run is outer else by_columns(72, r, dtype)
        check(run, door, [Product(wide, thin), Product(wide, thin, dropout=0.5, seed=3)], 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m,c", [(16, 48), (33, 56), (7, 35)])
def test_the_mask_bit_for_bit(door, m, c, dtype):
    """A product with the identity is D(wide), rounded once. 35 columns: no row but the first starts at a multiple of four."""
    wide, keep, seed = matrix(m, c, dtype, c + 8), torch.tensor(1 / 0.7), 2**40 + 5
    kept = (philox(m * c, seed, wide.device) >= int(0.3 * 2**32)).view(m, c)
    expected = torch.where(kept, wide.float() * keep, torch.zeros(())).to(dtype)
    (got,) = shrink(door, [Product(wide, torch.eye(c, dtype=dtype).t(), dropout=0.3, seed=seed)])
    assert torch.equal(got, expected)
    (got,) = outer(door, [Product(wide, torch.eye(m, dtype=dtype), dropout=0.3, seed=seed)])
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "run,dtype,split",
    [(run, dtype, 1 + (i + j) % 3) for i, run in enumerate((shrink, outer)) for j, dtype in enumerate(DTYPES)],
)
def test_a_list_is_its_single_calls_bit_for_bit(door, run, dtype, split):
    """Shared and own wide matrices, with and without dropout, every instance's r, and one that only fp32 units take."""
    m, c = 20, 136
    x, dy = matrix(m, c, dtype), matrix(m, c + 8, dtype)
    thin = partial(matrix, m) if run is outer else partial(by_columns, c)
    products = [Product(x, thin(r, dtype), scale=r / 7) for r in (16, 5, 12)]
    products += [Product(x, thin(r, dtype), dropout=0.25, seed=r) for r in (8, 31)]
    products += [Product(matrix(m, c, dtype, c + 1), thin(3, dtype))]
    rows = m if run is outer else c + 8
    products += [Product(dy, matrix(rows, r, dtype)) for r in (6, 64, 1)]
    if run is outer:
        products = [replace(p, transposed=i % 2 == 0, out_dtype=DTYPES[i % 3]) for i, p in enumerate(products)]
    together = run(door, products, split)
    check(run, door, products, split)
    for product, got in zip(products, together, strict=True):
        assert torch.equal(run(door, [product], split)[0], got)


def test_results_do_not_depend_on_the_order_of_threads():
    if why := HostDoor().why_not():
        pytest.skip(why)
    x = matrix(70, 200, torch.bfloat16)
    results = [
        (*shrink(HostDoor(seed), [Product(x, factor)], 2), *outer(HostDoor(seed), [Product(x, thin)], 2))
        for factor, thin in [(by_columns(200, 16, x.dtype), matrix(70, 16, x.dtype))]
        for seed in (1, 2, 3)
    ]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(door, dtype):
    """S is empty, and gradients are zero."""
    shrink(door, [Product(matrix(0, 64, dtype), by_columns(64, 8, dtype))], 2)
    for split in (1, 2):
        (got,) = outer(door, [Product(matrix(0, 64, dtype), matrix(0, 8, dtype))], split)
        assert torch.equal(got, torch.zeros(8, 64, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_where_it_is(door, dtype):
    """Padding is made of zeros, and no column stands in for another in a result."""
    wide, factor, thin = matrix(19, 72, dtype), by_columns(72, 5, dtype), matrix(19, 5, dtype)
    wide[4, 70], wide[18, 3] = float("inf"), float("nan")
    (s,) = shrink(door, [Product(wide, factor)], 2)
    assert (~s.isfinite()).any(1).nonzero().view(-1).tolist() == [4, 18] and (~s[4].isfinite()).all() and s[18].isnan().all()
    (da,) = outer(door, [Product(wide, thin)], 2)
    assert (~da.isfinite()).any(0).nonzero().view(-1).tolist() == [3, 70] and not da[:, 70].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sums(door, dtype):
    """Thousands of terms, among them runs of one sign."""
    wide = (torch.randn(2, 3072) + 1).to(dtype)
    check(shrink, door, [Product(wide, by_columns(3072, 2, dtype))])
    check(outer, door, [Product((torch.randn(2048, 8) + 1).to(dtype), matrix(2048, 2, dtype), out_dtype=torch.float32)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_beyond_32_bits(door, dtype):
    """Rows that are 2^31 elements apart, in a sparse mapping."""
    stride = 2**31 + 8
    wide = torch.frombuffer(mmap.mmap(-1, (stride + 64) * dtype.itemsize), dtype=dtype).as_strided((2, 64), (stride, 1))
    wide.copy_(torch.randn(2, 64))
    check(shrink, door, [Product(wide, by_columns(64, 8, dtype))])
    check(outer, door, [Product(wide, matrix(2, 8, dtype))])


@pytest.fixture
def ptx():
    made = PtxDoor()
    if why := made.why_not():
        pytest.skip(why)
    return made


@pytest.mark.parametrize("r", [16, 64])
def test_the_wide_matrix_is_read_once_and_by_128_bits(ptx, r):
    """A factor is read for each 32 rows, a thin matrix for each 64 columns; a list shares the wide matrix where it can."""
    m, c, dtype = 128, 256, torch.bfloat16
    x, a, b, thin = matrix(m, c, dtype), by_columns(c, r, dtype), matrix(c, r, dtype), matrix(m, r, dtype)
    width = 2 if r == 16 else 8  # elements of a row of b or thin that a lane loads at once
    for run, products, narrow in (
        (shrink, [Product(x, a)], {16: a.nbytes * m // 32}),
        (shrink, [Product(x, by_columns(c, 16, dtype)) for _ in range(4)], {16: 4 * 16 * c * 2 * m // 32}),
        (shrink, [Product(x, b)], {2 * width: b.nbytes * m // 32}),
        (outer, [Product(x, thin)], {2 * width: thin.nbytes * c // 64}),
    ):
        run(ptx, products)
        ((kernel, report),) = ptx.reports
        assert f"{run.__name__}_kernel" in kernel
        assert report.accesses["global", "load", 16] * 16 == x.nbytes + narrow.get(16, 0)
        if width == 2 and 4 in narrow:  # beside the parameters, which count as global here
            assert report.accesses["global", "load", 4] * 4 >= narrow[4]


def test_fp32_reads_the_wide_matrix_once(ptx):
    x = matrix(64, 128, torch.float32)
    shrink(ptx, [Product(x, by_columns(128, 64, x.dtype))])
    ((kernel, report),) = ptx.reports
    assert "thin_fma_kernel" in kernel and report.accesses["global", "load", 16] * 16 == x.nbytes
    outer(ptx, [Product(x, matrix(64, 64, x.dtype))])
    ((kernel, report),) = ptx.reports
    assert "thin_fma_kernel" in kernel and report.accesses["global", "load", 16] * 16 == x.nbytes


def test_one_list_is_one_launch_and_a_second_for_its_sums(ptx):
    x = matrix(40, 64, torch.float16)
    shrink(ptx, [Product(x, by_columns(64, r, x.dtype), dropout=r / 100, seed=r) for r in range(1, 17)], 2)
    assert [name for name, _ in ptx.reports if "shrink_kernel" in name or "sum_partials" in name] and len(ptx.reports) == 2
    outer(ptx, [Product(x, matrix(40, r, x.dtype)) for r in range(1, 17)], 2)
    assert len(ptx.reports) == 2


@pytest.mark.parametrize("function", ["nf4_lora_linear_shrink", "nf4_lora_linear_outer"])
def test_bad_lists_are_refused(door, function):
    with pytest.raises(ValueError, match="a list of weights: expected 1 to 16, got 0"):
        door.call(function, [], 4, 0, 1, None)
