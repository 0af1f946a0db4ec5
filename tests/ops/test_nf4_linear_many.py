"""nf4_linear with a list of weights: its outputs are the single calls' bit for bit, its gradients are theirs up to rounding."""

from __future__ import annotations

import pytest
import torch
from emulated import skip_beyond_reach, skip_but_a_sample
from numerics import assert_no_worse_than_twice_plain, plain_products, row_scaled

import peftk
from peftk.ops import nf4_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# m, k and the rows of each weight: odd ones, so that depths end inside a cell; chunks of the depth that span several weights.
SHAPES = [
    *((1, 64, (16, 40)), (3, 80, (48,)), (17, 33, (15, 7, 21)), (65, 128, (49, 130)), (0, 64, (8, 5))),
    *((530, 4160, (17, 16)), (530, 64, (2101, 2100))),  # several blocks of rows: of x, and of dy
    *((20, 192, (37, 64, 1)), (60, 64, (1301, 640, 2)), (52, 320, (1, 1, 1, 33))),
]


def weights_of(k: int, rows: tuple[int, ...]) -> list[peftk.NF4Weight]:
    """Each in another format, as far as there are enough."""
    formats = ({"double_quant": False}, {"block_size": 128}, {"quant_type": "fp4"}, {"block_size": 32})
    return [peftk.quantize_nf4(row_scaled(n, k), **formats[i % 4]) for i, n in enumerate(rows)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m,k,rows", SHAPES)
def test_outputs_are_the_single_ones(implementation, m, k, rows, dtype):
    skip_beyond_reach(implementation, m, k, sum(rows))
    skip_but_a_sample(implementation, dtype == DTYPES[m % 3])
    weights, x = weights_of(k, rows), torch.randn(m, k, dtype=dtype)
    biases = [torch.randn(n, dtype=dtype) if i % 2 else None for i, n in enumerate(rows)]
    for given in (biases, None):
        ys = nf4_linear(x, weights, given)
        singles = [nf4_linear(x, w, b) for w, b in zip(weights, given or [None] * len(rows), strict=True)]
        assert isinstance(ys, list) and all(torch.equal(a, b) for a, b in zip(ys, singles, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m,k,rows", SHAPES)
def test_gradients(implementation, m, k, rows, dtype):
    skip_beyond_reach(implementation, m, k, sum(rows))
    skip_but_a_sample(implementation, dtype == DTYPES[m % 3])
    weights, x = weights_of(k, rows), torch.randn(m, k, dtype=dtype, requires_grad=True)
    biases = [torch.randn(n, dtype=dtype, requires_grad=True) if i % 2 else None for i, n in enumerate(rows)]
    dys = [torch.randn(m, n, dtype=dtype) for n in rows]
    torch.autograd.backward(nf4_linear(x, weights, biases), dys)
    side_by_side = torch.cat([w.dequantize(torch.float32) for w in weights])
    dy = torch.cat(dys, 1)
    assert_no_worse_than_twice_plain(x.grad, plain_products(dy, side_by_side.to(dtype)), dy.double() @ side_by_side.double())
    for bias, one in zip(biases, dys, strict=True):
        if bias is not None:
            assert_no_worse_than_twice_plain(bias.grad, one.sum(0), one.double().sum(0))


def test_an_output_that_the_loss_leaves_out(implementation):
    weights, x = weights_of(64, (24, 40, 17)), torch.randn(6, 64, requires_grad=True)
    biases = [torch.randn(w.shape[0], requires_grad=True) for w in weights]
    used = nf4_linear(x, weights, biases)[1]
    got = torch.autograd.grad(used.square().sum(), (x, *biases), allow_unused=True)
    wanted = torch.autograd.grad(nf4_linear(x, weights[1], biases[1]).square().sum(), (x, biases[1]))
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[2], wanted[1]) and got[1] is None and got[3] is None


def test_shapes_and_strides(implementation):
    weights, x = weights_of(64, (24, 9)), torch.randn(3, 64, 5).transpose(1, 2)
    ys = nf4_linear(x, tuple(weights))
    assert [y.shape for y in ys] == [(3, 5, 24), (3, 5, 9)]
    assert all(torch.equal(y, nf4_linear(x, w)) for y, w in zip(ys, weights, strict=True))
    leaf = x.contiguous().requires_grad_()
    dys = [torch.randn(3, 48, 5).transpose(1, 2)[..., ::2], torch.randn(9).expand(3, 5, 9)]
    grads = [torch.autograd.grad(nf4_linear(leaf, weights), leaf, given) for given in (dys, [dy.contiguous() for dy in dys])]
    assert torch.allclose(*(grad for (grad,) in grads), atol=1e-4)


def test_same_result_for_any_number_of_threads(implementation):
    weights, threads = weights_of(320, (200, 37, 64)), torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        x, results = torch.randn(60, 320, dtype=dtype, requires_grad=True), []
        dys = [torch.randn(60, w.shape[0], dtype=dtype) for w in weights]
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            ys = nf4_linear(x, weights)
            results.append((*ys, *torch.autograd.grad(ys, x, dys)))
        torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), dtype


def test_gradcheck():
    weights, x = weights_of(10, (6, 3)), torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    with peftk.use("reference"):
        assert torch.autograd.gradcheck(lambda x, b: tuple(nf4_linear(x, weights, [None, b])), (x, bias))


def test_autocast(implementation):
    weights, x = weights_of(64, (8, 24)), torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        ys = nf4_linear(x, weights, [torch.zeros(8), None])
    assert all(torch.equal(y, nf4_linear(x.bfloat16(), w)) for y, w in zip(ys, weights, strict=True))


def test_compile_and_opcheck():
    weights = weights_of(64, (8, 24))
    x, bias = torch.randn(4, 64, requires_grad=True), torch.randn(8, requires_grad=True)
    tensors = [list(parts) for parts in zip(*(w.tensors() for w in weights), strict=True)]
    facts = (*tensors, [8, 24], [64, 128], ["nf4", "nf4"])
    torch.library.opcheck(torch.ops.peftk.nf4_linear_many.default, (x, *facts, [bias, None]))
    dys = [torch.randn(4, 8), torch.randn(4, 24)]
    torch.library.opcheck(torch.ops.peftk.nf4_linear_many_dx.default, (dys, *tensors, 64, *facts[-2:]))
    compiled = torch.compile(lambda x, b: torch.ops.peftk.nf4_linear_many(x, *facts, [b, None]), fullgraph=True)
    ys, eager = compiled(x, bias), nf4_linear(x, weights, [bias, None])
    for keep in (slice(0, 2), slice(1, 2)):
        got, wanted = (
            torch.autograd.grad(sum(y.square().sum() for y in some[keep]), (x, bias), allow_unused=True, retain_graph=True)
            for some in (ys, eager)
        )
        assert torch.allclose(got[0], wanted[0], atol=1e-4)
        assert (wanted[1] is None and not got[1].any()) or torch.allclose(got[1], wanted[1], atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(ys, eager, strict=True))


@pytest.mark.parametrize("m", [3, 60])
def test_the_straight_way_and_the_dispatcher_agree(m):
    """A call without gradients for few rows of x skips torch's dispatcher; more rows share a packed x."""
    weights, x, bias = weights_of(64, (24, 9)), torch.randn(m, 64), [None, torch.randn(9)]
    tensors = [list(parts) for parts in zip(*(w.tensors() for w in weights), strict=True)]
    through = torch.ops.peftk.nf4_linear_many(x, *tensors, [24, 9], [64, 128], ["nf4", "nf4"], bias)
    assert all(torch.equal(a, b) for a, b in zip(nf4_linear(x, weights, bias), through, strict=True))
    bias[1].requires_grad_()
    assert all(y.requires_grad for y in nf4_linear(x, weights, bias))


def test_bad_arguments_are_named():
    weights, x = weights_of(64, (8, 24)), torch.randn(4, 64)
    with pytest.raises(ValueError, match=r"x: expected \(\.\.\., 32\) for w4\[1\] of shape \(8, 32\), got \(4, 64\)"):
        nf4_linear(x, [weights[0], peftk.quantize_nf4(row_scaled(8, 32))])
    with pytest.raises(TypeError, match=r"w4\[1\]: expected an NF4Weight, got Tensor"):
        nf4_linear(x, [weights[0], x])
    with pytest.raises(ValueError, match="w4: expected at least one weight, got an empty list"):
        nf4_linear(x, [])
    with pytest.raises(ValueError, match=r"bias\[1\]: expected shape \(24,\), got \(9,\)"):
        nf4_linear(x, weights, [None, torch.zeros(9)])
    with pytest.raises(ValueError, match="bias: expected a list of 2, one for each weight, got Tensor"):
        nf4_linear(x, weights, torch.zeros(8))
    with pytest.raises(ValueError, match="bias: expected a list of 2, one for each weight, got 1 of them"):
        nf4_linear(x, weights, [None])
    weights[1].absmax = weights[1].absmax[:-1]
    with pytest.raises(ValueError, match=r"w4\[1\]\.absmax: expected 12 values"):
        nf4_linear(x, weights)
