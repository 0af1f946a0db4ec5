"""nf4_lora_linear_rows: dA and dB are those of nf4_lora_linear on an adapter's own rows bit for bit; y, dx, dz, dbias against
fp64."""

from __future__ import annotations

import pytest
import torch
from low_rank import DTYPES
from numerics import assert_no_worse_than_twice_plain, row_scaled
from torch.nn import functional

import peftk
from peftk.ops import nf4_linear, nf4_lora_linear, nf4_lora_linear_rows

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# b, rows of x an entry, k, n, ranks, index: all base, one adapter, adapters without rows, runs and mixtures, each way that the
# CPU kernels take (one to four rows, strips, panels, several blocks of rows).
SHAPES = [
    (1, 1, 64, 16, (8,), (0,)),
    (3, 1, 80, 48, (4, 1, 3), (2, -1, 0)),
    (4, 1, 128, 40, (16, 8), (1, 0, 1, -1)),
    (8, 1, 192, 49, (16, 3, 8, 64), (3, 0, 0, -1, 1, 3, 2, 1)),
    (5, 3, 33, 21, (5, 2), (0, 1, 0, -1, 1)),
    (9, 7, 128, 130, (16, 8, 1), (2, 2, 0, 1, -1, 0, 0, 2, 2)),
    (2, 265, 4160, 17, (5, 4), (1, 0)),
    (2, 2, 64, 16, (8, 8), (-1, -1)),
    (2, 1, 64, 16, (), (-1, -1)),
    (0, 1, 64, 16, (4,), ()),
]
SCALES = (0.5, 2.0, 1.25, 0.75)


class Rows:
    """A weight, adapters and a batch."""

    def __init__(self, b, each, k, n, ranks, index, dtype, with_z=False):
        leaf = lambda *shape, by=1.0: (torch.randn(*shape) * by).to(dtype).requires_grad_()  # noqa: E731
        self.w4 = peftk.quantize_nf4(row_scaled(n, k) / k**0.5, block_size=64 if k % 64 == 0 else 32)
        self.A, self.B = [leaf(r, k, by=k**-0.5) for r in ranks], [leaf(n, r) for r in ranks]
        self.x, self.bias = leaf(b, each, k), leaf(n)
        self.z = leaf(b, each, k) if with_z else None
        self.scale, self.index, self.dtype = list(SCALES[: len(ranks)]), list(index), dtype

    def leaves(self):
        return [*self.inputs(), *self.A, *self.B]

    def run(self):
        return nf4_lora_linear_rows(self.x, self.w4, self.A, self.B, self.scale, self.index, self.bias, self.z)

    def inputs(self):
        return [t for t in (self.x, self.z, self.bias) if t is not None]

    def plain(self, dtype, dy, by_k):
        """y and the gradients of the inputs, an adapter after the other by plain products in ``dtype``; by_k: the order of k."""
        x, z, bias = (None if t is None else t.detach().to(dtype).requires_grad_() for t in (self.x, self.z, self.bias))
        A, B = ([t.detach().to(dtype) for t in factors] for factors in (self.A, self.B))
        y = functional.linear(x[..., by_k], self.w4.dequantize(FP32).to(dtype)[:, by_k], bias)
        for i, scale in enumerate(self.scale):
            rows = self.rows_of(i)
            s = functional.linear((x if z is None else z)[rows][..., by_k], A[i][:, by_k])
            y = y.index_add(0, rows, functional.linear(s, B[i]) * scale)
        return y, *torch.autograd.grad(y, [t for t in (x, z, bias) if t is not None], dy.to(dtype), materialize_grads=True)

    def rows_of(self, adapter):
        return torch.tensor([row for row, one in enumerate(self.index) if one == adapter], dtype=torch.int64)

    def own_gradients(self, adapter, dy):
        """dA and dB by nf4_lora_linear on the adapter's rows."""
        rows, factors = self.rows_of(adapter), (self.A[adapter], self.B[adapter])
        x, z = (None if t is None else t.detach()[rows] for t in (self.x, self.z))
        y = nf4_lora_linear(x, self.w4, *factors, self.scale[adapter], None, z)
        return torch.autograd.grad(y, factors, dy[rows])


@pytest.mark.parametrize("with_z", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b,each,k,n,ranks,index", SHAPES)
def test_outputs_and_gradients(implementation, b, each, k, n, ranks, index, dtype, with_z):
    if implementation.partition("-")[0] not in ("reference", "cpu"):
        pytest.skip("the op has a reference and a CPU kernel; other devices run nf4_linear and torch's products")
    rows = Rows(b, each, k, n, ranks, index, dtype, with_z)
    dy = torch.randn(b, each, n).to(dtype)
    y = rows.run()
    inputs = rows.inputs()
    results = y, *torch.autograd.grad(y, (*inputs, *rows.A, *rows.B), dy)
    assert y.shape == (b, each, n) and y.dtype == dtype
    orders = torch.arange(k), torch.randperm(k), torch.randperm(k)
    plains = [rows.plain(dtype, dy, by_k) for by_k in orders]
    for at, exact in enumerate(rows.plain(torch.float64, dy, orders[0])):
        assert_no_worse_than_twice_plain(results[at], [plain[at] for plain in plains], exact)
    for i in range(len(ranks)):
        for got, wanted in zip(results[1 + len(inputs) + i :: len(ranks)], rows.own_gradients(i, dy), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b,each,k,n,ranks,index", SHAPES)
def test_rows_without_an_adapter_are_the_base_products_bit_for_bit(b, each, k, n, ranks, index, dtype):
    rows = Rows(b, each, k, n, ranks, index, dtype)
    alone = [i for i, one in enumerate(index) if one < 0]
    base = nf4_linear(rows.x, rows.w4, rows.bias)
    assert torch.equal(rows.run()[alone], base[alone])
    with torch.no_grad():
        assert torch.equal(rows.run(), nf4_lora_linear_rows(*_through_dispatcher(rows)))


def _through_dispatcher(rows):
    """The same call; a z that is x keeps it off the straight path."""
    return rows.x, rows.w4, rows.A, rows.B, rows.scale, rows.index, rows.bias, rows.x


def test_threads_change_nothing():
    rows, before = Rows(9, 7, 128, 130, (16, 8, 1), SHAPES[5][-1], BF16), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = rows.run()
            results.append([y, *torch.autograd.grad(y.float().square().sum(), rows.leaves())])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck_of_the_reference():
    rows = Rows(4, 2, 32, 5, (3, 2), (1, -1, 0, 1), torch.float64, with_z=True)
    with peftk.use("reference"):
        assert torch.autograd.gradcheck(lambda *_: rows.run(), rows.leaves())


def test_opcheck():
    rows = Rows(4, 2, 64, 16, (3, 2), (1, -1, 0, 1), FP32)
    facts = (rows.index, rows.scale, 16, rows.w4.block_size, rows.w4.quant_type)
    arguments = (rows.x, *rows.w4.tensors(), rows.A, rows.B, rows.bias, None, *facts)
    torch.library.opcheck(torch.ops.peftk.nf4_lora_linear_rows.default, arguments)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "change,message",
    [
        ({"index": [0, 1]}, "index: expected 3 entries, got 2"),
        ({"index": [0, 2, 1]}, "index: expected numbers from -1 to 1, got 0 to 2"),
        ({"index": [0, -2, 1]}, "index: expected numbers from -1 to 1, got -2 to 1"),
        ({"scale": [1.0]}, "expected as many of each, got 2, 2 and 1"),
        ({"A": [torch.randn(4, 64), torch.randn(4, 63)]}, r"A\[1\]: expected \(r, 64\), got \(4, 63\)"),
        ({"B": [torch.randn(16, 3), torch.randn(16, 4)]}, r"B\[0\]: expected \(16, 4\), got \(16, 3\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message, grad):
    given = {
        "x": torch.randn(3, 64, requires_grad=grad),
        "w4": peftk.quantize_nf4(torch.randn(16, 64)),
        "A": [torch.randn(4, 64)] * 2,
        "B": [torch.randn(16, 4)] * 2,
        "scale": [1.0, 2.0],
        "index": [0, -1, 1],
    }
    with pytest.raises(ValueError, match=message):
        nf4_lora_linear_rows(**{**given, **change})
