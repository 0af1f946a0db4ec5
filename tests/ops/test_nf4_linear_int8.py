"""nf4_linear_int8 against its definition, in integers and fp64, and against the exact product within a stated bound."""

from __future__ import annotations

import pytest
import torch
from numerics import row_scaled

import peftk
from peftk.format.code4 import code4
from peftk.ops import nf4_linear, nf4_linear_int8

# m, k, n, block size: every number of rows that the kernels tell apart; an odd number of runs; blocks that straddle rows, runs
# (k % 64 != 0), and whole matrices.
SHAPES = [
    (1, 64, 16, 64),
    (1, 192, 35, 128),
    (2, 320, 17, 64),
    (3, 128, 48, 4096),
    (5, 1088, 33, 64),
    (16, 192, 130, 128),
    (17, 4096, 20, 4096),
    (65, 320, 49, 64),
    (130, 576, 64, 64),
    (1, 80, 7, 64),
    (3, 33, 15, 64),
    (16, 96, 24, 32),
    (65, 112, 18, 128),
    (0, 64, 8, 64),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rounded(x, w4):
    """x and W in fp64 as the op sees them: 8-bit integers times their scales. Integers in int64, scales in fp32."""
    m, k = x.shape
    x_hat, x = torch.zeros(m, k, dtype=torch.float64), x.float()
    for start in range(0, k, 64):
        run = x[:, start : start + 64]
        scale = run.abs().amax(1, keepdim=True) / 127
        q = torch.where(scale > 0, torch.round(run / scale), 0.0).long()
        x_hat[:, start : start + 64] = q * scale.double()
    code = code4(w4.quant_type)
    table = [round(code.int8_scale * value) for value in torch.tensor(code.values).tolist()]
    packed, count = w4.packed.reshape(-1).tolist(), w4.shape.numel()
    integers = torch.tensor([table[nibble] for byte in packed for nibble in (byte >> 4, byte & 15)][:count])
    ones = peftk.NF4Weight(torch.full_like(w4.packed, 0xFF if code.number == 0 else 0x33), *w4.tensors()[1:], w4.shape, w4.dtype,
                           w4.block_size, w4.quant_type)  # fmt: skip
    absmax = ones.dequantize(torch.float32).double()  # of each element: its code's value is 1
    return x_hat, integers.view(w4.shape) * absmax / code.int8_scale


def assert_is(y, x_hat, w_hat, bias):
    """Sums in fp32 in any order, then one rounding to y's dtype."""
    truth, magnitude = x_hat @ w_hat.T, x_hat.abs() @ w_hat.abs().T
    if bias is not None:
        truth, magnitude = truth + bias.double(), magnitude + bias.double().abs()
    bound = 16 * torch.finfo(torch.float32).eps * magnitude + torch.finfo(y.dtype).eps * truth.abs() + 1e-7
    assert y.shape == truth.shape and not y.isnan().any()
    assert ((y.double() - truth).abs() <= bound).all(), ((y.double() - truth).abs() / bound).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m,k,n,block_size", SHAPES)
def test_is_its_definition(implementation, m, k, n, block_size, dtype):
    w4 = peftk.quantize_nf4(row_scaled(n, k) / (8 * k**0.5), block_size, double_quant=n % 2 == 0)
    x, bias = row_scaled(m, k, dtype=dtype), torch.randn(n, dtype=dtype)
    x_hat, w_hat = rounded(x, w4)
    assert_is(nf4_linear_int8(x, w4, bias), x_hat, w_hat, bias)
    assert_is(nf4_linear_int8(x, w4), x_hat, w_hat, None)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
@pytest.mark.parametrize("m", [1, 6])
def test_formats(implementation, m, block_size, double_quant, quant_type):
    """300 rows of 5 runs: more than one group of 256 blocks, ends in the middle of everything."""
    w4 = peftk.quantize_nf4(row_scaled(301, 320), block_size, double_quant, quant_type=quant_type)
    x = torch.randn(m, 320)
    assert_is(nf4_linear_int8(x, w4), *rounded(x, w4), None)


def test_every_code_and_the_biggest_dots(implementation):
    """Runs where every product is the largest that there is, of either sign; each code alone in a row of W."""
    for quant_type in ("nf4", "fp4"):
        for code in range(16):
            w4 = peftk.quantize_nf4(torch.ones(5, 128), quant_type=quant_type)
            w4.packed.fill_(code * 0x11)
            for m in (1, 5):
                x = torch.ones(m, 128) * torch.tensor([-2.0, 3.0]).repeat_interleave(64)
                assert_is(nf4_linear_int8(x, w4), *rounded(x, w4), None)


@pytest.mark.parametrize(
    ("make_x", "most"),
    [
        (lambda m, k: torch.randn(m, k), 0.010),
        (lambda m, k: torch.randn(m, k).relu(), 0.016),  # a mean that is not 0: the table's errors add up
        (lambda m, k: torch.randn(m, k) * torch.where(torch.arange(k) % 500 == 7, 100.0, 1.0), 0.025),  # outlier channels
    ],
    ids=["gaussian", "rectified", "outliers"],
)
@pytest.mark.parametrize("m", [1, 16])
def test_distance_to_the_exact_product(implementation, m, make_x, most):
    """In Frobenius norm; the contract states what is typical, this bounds it."""
    w4, x = peftk.quantize_nf4(torch.randn(256, 2048)), make_x(m, 2048)
    truth = x.double() @ w4.dequantize(torch.float32).double().T
    distance = (nf4_linear_int8(x, w4).double() - truth).norm() / truth.norm()
    assert 0.003 < distance < most


@pytest.mark.parametrize("m", [1, 4, 20])
@pytest.mark.parametrize("k", [192, 80])
def test_zero_runs_and_zero_blocks(implementation, k, m):
    w = row_scaled(20, k)
    w[3], w[:, :64] = 0.0, 0.0
    w4, x = peftk.quantize_nf4(w), torch.randn(m, k)
    x[0], x[m // 2, 64:] = 0.0, 0.0
    y = nf4_linear_int8(x, w4)
    assert (y[0] == 0).all() and (y[:, 3] == 0).all() and (y[m // 2] == 0).all()
    assert_is(y, *rounded(x, w4), None)


@pytest.mark.parametrize("m", [1, 4, 20])
@pytest.mark.parametrize("k", [128, 80])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_a_row_with_inf_or_nan_is_nan(implementation, bad, k, m):
    w4, x = peftk.quantize_nf4(row_scaled(20, k)), torch.randn(m, k)
    good = nf4_linear_int8(x, w4)
    x[m // 2, 70] = bad
    y, others = nf4_linear_int8(x, w4), torch.arange(m) != m // 2
    assert y[m // 2].isnan().all() and torch.equal(y[others], good[others])


@pytest.mark.parametrize("m", [1, 5])
def test_tiny_and_huge_runs(implementation, m):
    """Below 2^-100 a run counts as zero; at the other end nothing overflows that the result does not."""
    w4 = peftk.quantize_nf4(row_scaled(20, 128))
    x = torch.randn(m, 128) * torch.tensor([2.0**-110, 1.0]).repeat_interleave(64)
    only = x.clone()
    only[:, :64] = 0.0
    assert torch.equal(nf4_linear_int8(x, w4), nf4_linear_int8(only, w4))
    scaled = nf4_linear_int8(only * 2.0**100, w4)
    assert torch.equal(scaled, nf4_linear_int8(only, w4) * 2.0**100)
    near = only * 2.0**-90
    assert_is(nf4_linear_int8(near, w4) * 2.0**90, rounded(near, w4)[0] * 2.0**90, rounded(near, w4)[1], None)


def test_rounds_to_nearest_even(implementation):
    """x / scale = 0.5, 1.5, 2.5 … are ties."""
    x = torch.zeros(1, 64)
    x[0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    w = torch.zeros(6, 64)
    w.fill_diagonal_(1.0)
    y = nf4_linear_int8(x, peftk.quantize_nf4(w, double_quant=False))
    assert torch.allclose(y, torch.tensor([[127.0, 0.0, 2.0, 2.0, 0.0, -2.0]]))


def test_shapes_and_strides(implementation):
    w4 = peftk.quantize_nf4(row_scaled(24, 64))
    x = torch.randn(3, 64, 5)
    flat = nf4_linear_int8(x.transpose(1, 2).reshape(15, 64), w4)
    assert torch.equal(nf4_linear_int8(x.transpose(1, 2), w4), flat.view(3, 5, 24))
    assert nf4_linear_int8(torch.randn(64), w4).shape == (24,)
    wide = torch.randn(4, 128)
    for part in (wide[:, ::2], wide[:, 32:96], wide[::2, :64]):
        assert torch.equal(nf4_linear_int8(part, w4), nf4_linear_int8(part.contiguous(), w4))


def test_a_row_does_not_depend_on_its_company(implementation):
    """Rows beside each other, as many as a strip takes: the same bits wherever a row stands."""
    w4, x = peftk.quantize_nf4(row_scaled(40, 256)), torch.randn(300, 256)
    y = nf4_linear_int8(x, w4)
    assert torch.equal(nf4_linear_int8(x[100:200], w4), y[100:200])


def test_same_result_for_any_number_of_threads(implementation):
    w4, threads = peftk.quantize_nf4(row_scaled(200, 320)), torch.get_num_threads()
    for m in (1, 3, 150):
        x, results = torch.randn(m, 320, dtype=torch.bfloat16), []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(nf4_linear_int8(x, w4))
        torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_where_a_gradient_is_wanted_it_is_exact(implementation):
    w4 = peftk.quantize_nf4(row_scaled(8, 64))
    x, bias = torch.randn(4, 64), torch.randn(8)
    exact, with_bias = nf4_linear(x, w4), nf4_linear(x, w4, bias)
    assert not torch.equal(nf4_linear_int8(x, w4), exact)
    leaf = x.clone().requires_grad_()
    y = nf4_linear_int8(leaf, w4)
    assert torch.equal(y, exact)
    dx = torch.autograd.grad(y, leaf, torch.ones_like(y))[0]
    assert torch.equal(dx, torch.autograd.grad(nf4_linear(leaf, w4), leaf, torch.ones_like(y))[0])
    assert torch.equal(nf4_linear_int8(x, w4, bias.requires_grad_()), with_bias)
    with torch.no_grad():
        assert torch.equal(nf4_linear_int8(leaf, w4), nf4_linear_int8(x, w4))


def test_autocast(implementation):
    w4, x = peftk.quantize_nf4(row_scaled(8, 64)), torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = nf4_linear_int8(x, w4)
    assert y.dtype == torch.bfloat16 and torch.equal(y, nf4_linear_int8(x.bfloat16(), w4))


def test_the_reference_takes_fp64():
    w4, x = peftk.quantize_nf4(row_scaled(8, 64)), torch.randn(4, 64, dtype=torch.float64)
    with peftk.use("reference"):
        y = nf4_linear_int8(x, w4)
    assert y.dtype == torch.float64 and torch.allclose(y, nf4_linear(x, w4), rtol=0.1, atol=0.02 * float(y.abs().max()))


def test_compile_and_opcheck():
    w4 = peftk.quantize_nf4(row_scaled(8, 64))
    for wants in (False, True):
        x, bias = torch.randn(4, 64, requires_grad=wants), torch.randn(8, requires_grad=wants)
        arguments = (*w4.tensors(), 8, 64, "nf4", bias)
        torch.library.opcheck(torch.ops.peftk.nf4_linear_int8.default, (x, *arguments))
        compiled = torch.compile(lambda x, rest: torch.ops.peftk.nf4_linear_int8(x, *rest), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, arguments), nf4_linear_int8(x, w4, bias))


def test_bad_arguments_are_named():
    w4, x = peftk.quantize_nf4(row_scaled(8, 64)), torch.randn(4, 64)
    with pytest.raises(ValueError, match=r"x: expected \(\.\.\., 64\) for a weight of shape \(8, 64\), got \(4, 63\)"):
        nf4_linear_int8(x[:, 1:], w4)
    with pytest.raises(ValueError, match=r"bias: expected shape \(8,\), got \(9,\)"):
        nf4_linear_int8(x, w4, torch.zeros(9))
    with pytest.raises(TypeError, match="w4: expected an NF4Weight, got Tensor"):
        nf4_linear_int8(x, x)
    with peftk.use("cpu"), pytest.raises(RuntimeError, match="x is torch.float64, the kernels take fp32, bf16 and fp16"):
        nf4_linear_int8(x.double(), w4)
