"""nf4_linear and its transpose against fp64 products with the dequantised weight."""

from __future__ import annotations

import contextvars
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from numerics import assert_no_worse_than_twice_plain, plain_products, row_scaled

import peftk
from peftk.ops import nf4_linear

# A covering sample of m, k, n: whole vectors, ragged ones, odd k, blocks that straddle rows; a depth of several chunks.
SHAPES = [
    *((1, 64, 16), (3, 80, 48), (16, 96, 130), (17, 33, 15), (65, 128, 49), (130, 576, 64), (17, 4304, 48), (0, 64, 8)),
    *((2, 192, 37), (4, 320, 18), (8, 128, 33), (20, 576, 47), (37, 640, 16), (52, 5248, 20), (9, 320, 1424)),
    *((1, 4416, 17), (6, 2368, 33)),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m,k,n", SHAPES)
def test_forward(implementation, m, k, n, dtype):
    w4 = peftk.quantize_nf4(row_scaled(n, k), double_quant=n % 2 == 0)
    x, bias = torch.randn(m, k, dtype=dtype), torch.randn(n, dtype=dtype)
    w = w4.dequantize(torch.float32)
    orders = [torch.arange(k), torch.arange(k).flip(0), torch.randperm(k)]
    plain = [torch.nn.functional.linear(x[:, o], w.to(dtype)[:, o]) for o in orders]
    with_bias = [torch.nn.functional.linear(x[:, o], w.to(dtype)[:, o], bias) for o in orders]
    truth = x.double() @ w.double().T
    assert_no_worse_than_twice_plain(nf4_linear(x, w4, bias), with_bias, truth + bias.double())
    assert_no_worse_than_twice_plain(nf4_linear(x, w4), plain, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m,k,n", SHAPES)
def test_gradients(implementation, m, k, n, dtype):
    w4 = peftk.quantize_nf4(row_scaled(n, k))
    x, bias = torch.randn(m, k, dtype=dtype, requires_grad=True), torch.randn(n, dtype=dtype, requires_grad=True)
    dy, w = torch.randn(m, n, dtype=dtype), w4.dequantize(torch.float32)
    nf4_linear(x, w4, bias).backward(dy)
    assert_no_worse_than_twice_plain(x.grad, plain_products(dy, w.to(dtype)), dy.double() @ w.double())
    assert_no_worse_than_twice_plain(bias.grad, dy.sum(0), dy.double().sum(0))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
def test_formats(implementation, block_size, quant_type):
    w4 = peftk.quantize_nf4(row_scaled(40, 320), block_size, quant_type=quant_type)
    x = torch.randn(5, 320)
    w = w4.dequantize(torch.float32)
    assert_no_worse_than_twice_plain(nf4_linear(x, w4), plain_products(x, w.T), x.double() @ w.double().T)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("m", [1, 3, 20, 60])
def test_a_constant_that_is_not_finite_spoils_its_own_row_only(implementation, m, value):
    w4 = peftk.quantize_nf4(row_scaled(34, 192), double_quant=False)
    for dtype in DTYPES:
        x = torch.randn(m, 192, dtype=dtype)
        good = nf4_linear(x, w4)
        bad = peftk.NF4Weight(w4.packed, w4.absmax.clone(), None, None, w4.shape, w4.dtype, w4.block_size)
        bad.absmax[5 * 3 + 1] = value
        y = nf4_linear(x, bad)
        assert not y[:, 5].isfinite().any()
        assert torch.equal(y[:, :5], good[:, :5]) and torch.equal(y[:, 6:], good[:, 6:])


def test_shapes_and_strides(implementation):
    w4 = peftk.quantize_nf4(row_scaled(24, 64))
    x = torch.randn(3, 64, 5)
    flat = nf4_linear(x.transpose(1, 2).reshape(15, 64), w4)
    assert torch.equal(nf4_linear(x.transpose(1, 2), w4), flat.view(3, 5, 24))
    assert nf4_linear(torch.randn(64), w4).shape == (24,)
    wide = torch.randn(4, 128)
    assert torch.equal(nf4_linear(wide[:, ::2], w4), nf4_linear(wide[:, ::2].contiguous(), w4))


def test_same_result_for_any_number_of_threads(implementation):
    w4, threads = peftk.quantize_nf4(row_scaled(200, 320)), torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        x, results = torch.randn(33, 320, dtype=dtype, requires_grad=True), []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            y = nf4_linear(x, w4)
            results.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
        torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), dtype


def test_in_turn_with_torchs_own_products(implementation):
    """oneDNN configures the tile registers of a thread for itself, as the AMX tier does: neither may find the other's."""
    w4 = peftk.quantize_nf4(torch.randn(256, 320))
    x, weight = torch.randn(64, 320).bfloat16(), w4.dequantize(torch.bfloat16)
    ours, theirs = nf4_linear(x, w4), x @ weight.T

    def in_turn():
        for _ in range(5):
            assert torch.equal(x @ weight.T, theirs) and torch.equal(nf4_linear(x, w4), ours)

    in_turn()
    with ThreadPoolExecutor(1) as other:
        other.submit(contextvars.copy_context().run, in_turn).result()


def test_gradcheck():
    w4 = peftk.quantize_nf4(row_scaled(6, 10))
    x, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 10), (6,)))
    with peftk.use("reference"):
        assert torch.autograd.gradcheck(lambda x, b: nf4_linear(x, w4, b), (x, bias))


def test_autocast(implementation):
    w4, x = peftk.quantize_nf4(row_scaled(8, 64)), torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = nf4_linear(x, w4, torch.zeros(8))
    assert y.dtype == torch.bfloat16 and torch.equal(y, nf4_linear(x.bfloat16(), w4, torch.zeros(8).bfloat16()))


def test_no_whole_weight_is_written():
    """Forward and backward of a 4096x4096 layer at m = 8 allocate less than 8 MB, where a bf16 W takes 33.5 MB."""
    w4 = peftk.quantize_nf4(torch.randn(4096, 4096))
    x = torch.randn(8, 4096, dtype=torch.bfloat16, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        nf4_linear(x, w4).sum().backward()
    biggest = max((event.cpu_memory_usage for event in profile.events()), default=0)
    assert 0 < biggest < 8 << 20


def test_compile_and_opcheck():
    w4 = peftk.quantize_nf4(row_scaled(8, 64))
    tensors = w4.tensors()
    x, bias = torch.randn(4, 64, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(torch.ops.peftk.nf4_linear.default, (x, *tensors, 8, 64, "nf4", bias))
    torch.library.opcheck(torch.ops.peftk.nf4_linear_dx.default, (torch.randn(4, 8), *tensors, 64, 64, "nf4"))
    eager = nf4_linear(x, w4, bias)
    compiled = torch.compile(lambda x: torch.ops.peftk.nf4_linear(x, *tensors, 8, 64, "nf4", bias), fullgraph=True)
    y = compiled(x)
    assert torch.allclose(y, eager)
    assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(eager.sum(), x)[0])


def test_bad_arguments_are_named():
    w4, x = peftk.quantize_nf4(row_scaled(8, 64)), torch.randn(4, 64)
    with pytest.raises(ValueError, match=r"x: expected \(\.\.\., 64\) for a weight of shape \(8, 64\), got \(4, 63\)"):
        nf4_linear(x[:, 1:], w4)
    with pytest.raises(ValueError, match=r"bias: expected shape \(8,\), got \(9,\)"):
        nf4_linear(x, w4, torch.zeros(9))
    with pytest.raises(TypeError, match="w4: expected an NF4Weight, got Tensor"):
        nf4_linear(x, x)
    with pytest.raises(TypeError, match="x: expected a floating-point tensor, got torch.int64"):
        nf4_linear(x.long(), w4)
    with pytest.raises(ValueError, match=r"w4: expected a weight of shape \(n, k\), got \(8,\)"):
        nf4_linear(x, peftk.quantize_nf4(torch.ones(8)))


def test_the_straight_way_and_the_dispatcher_agree():
    """Without gradients a call skips torch's dispatcher; whatever has to be noticed there is noticed all the same."""
    w4, x, bias = peftk.quantize_nf4(row_scaled(24, 64)), torch.randn(2, 3, 64), torch.randn(24, requires_grad=True)
    through = torch.ops.peftk.nf4_linear(x, *w4.tensors(), 24, w4.block_size, w4.quant_type, bias.detach())
    with torch.no_grad():
        assert torch.equal(nf4_linear(x, w4, bias), through)
        w4.packed = peftk.quantize_nf4(row_scaled(24, 64)).packed
        assert not torch.equal(nf4_linear(x, w4, bias), through), "a replaced part is seen"
        w4.absmax = w4.absmax[:-1]
        with pytest.raises(ValueError, match="absmax: expected 24 values"):
            nf4_linear(x, w4)
    w4 = peftk.quantize_nf4(row_scaled(24, 64))
    assert nf4_linear(x, w4, bias).requires_grad
    with torch.device("meta"):
        assert nf4_linear(x, w4).device.type == "cpu"
    seen = torch.func.vmap(lambda row: nf4_linear(row, w4))(x)
    assert torch.allclose(seen, nf4_linear(x, w4), atol=1e-5)
