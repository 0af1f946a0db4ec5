"""nf4_lora_linear with lists: y, dA, dB, dbias are the single calls' bit for bit; dx, dz, which are sums, against fp64."""

from __future__ import annotations

import pytest
import torch
from emulated import skip_beyond_reach, skip_but_a_sample
from low_rank import DTYPES
from numerics import assert_no_worse_than_twice_plain, row_scaled

import peftk
from peftk.ops import nf4_linear, nf4_lora_linear, philox_dropout

LONG = (530, 4160, (17, 16), (5, 4))  # several blocks of rows of x; seconds a case
# m, k, n and r of each weight: odd ones, so that depths end inside a cell; chunks of the depth that span several weights.
SHAPES = [
    (1, 64, (16, 40), (8, 3)),
    (3, 80, (48,), (4,)),
    (17, 33, (15, 7, 21), (64, 1, 5)),
    (65, 128, (49, 130), (8, 16)),
    (60, 64, (1301, 640, 2), (3, 16, 8)),
    LONG,
    (20, 192, (37, 64, 1), (8, 8, 8)),
    (0, 64, (8, 5), (2, 1)),
]
# Several blocks of rows of dy. Not in fp32: of 34,000 elements of dx the worst is 2.3 times as far off as a plain product's, by
# the norm 1.3 times; a single weight of 4201 rows, summed in the same chains, is 1.3 times by the norm, 1.2 to 1.5 by the worst.
DEEP = (530, 64, (2101, 2100), (5, 4))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Of m, dtype, dropout, z: what emulators run.
SAMPLE = {
    *((1, BF16, 0.3, False), (3, FP32, 0.0, True), (17, FP16, 0.3, False), (0, FP32, 0.0, False)),
    *((65, BF16, 0.0, True), (65, FP16, 0.3, False), (20, FP32, 0.3, False), (20, BF16, 0.3, True)),
}
CASES = [
    pytest.param(
        *shape, dtype, p, with_z, marks=[pytest.mark.full] if shape is LONG and (dtype, p, with_z) != (BF16, 0.3, True) else []
    )
    for shape in (*SHAPES, DEEP)
    for dtype in DTYPES
    if shape != DEEP or dtype != FP32
    for p in (0.0, 0.3)
    for with_z in (False, True)
]
FORMATS = ({"double_quant": False}, {"block_size": 128}, {"quant_type": "fp4"}, {"block_size": 32})
SCALES, SEEDS = [0.5, 2.0, 1.25], [11, 5, 2**40]


class Lists:
    """Weights with branches of their own, as lists; a bias for some."""

    def __init__(self, k: int, rows: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype = torch.float32):
        leaf = lambda *shape, by=1.0: (torch.randn(*shape) * by).to(dtype).requires_grad_()  # noqa: E731
        self.weights = [peftk.quantize_nf4(row_scaled(n, k) / k**0.5, **FORMATS[i % 4]) for i, n in enumerate(rows)]
        self.A = [leaf(r, k, by=k**-0.5) for r in ranks]
        self.B = [leaf(n, r) for n, r in zip(rows, ranks, strict=True)]
        self.bias = [leaf(n) if i % 2 else None for i, n in enumerate(rows)]
        self.scale, self.seed = SCALES[: len(rows)], SEEDS[: len(rows)]

    def leaves(self) -> list[torch.Tensor]:
        return [*self.A, *self.B, *(b for b in self.bias if b is not None)]

    def run(self, x, z=None, dropout=0.0):
        return nf4_lora_linear(x, self.weights, self.A, self.B, self.scale, self.bias, z, dropout, self.seed)

    def one(self, i, x, z=None, dropout=0.0):
        parts = (self.weights[i], self.A[i], self.B[i], self.scale[i], self.bias[i])
        return nf4_lora_linear(x, *parts, z, dropout, self.seed[i])

    def plain(self, x, z, dropout, dtype, dys):
        """Gradients of x and z by plain products in ``dtype``, with all the weights in one, as a library would be called."""
        A, B = ([t.detach().to(dtype) for t in factors] for factors in (self.A, self.B))
        x, z = (None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, z))
        branch, lows = x if z is None else z, []
        for i, scale in enumerate(self.scale):
            low = philox_dropout(branch, dropout, self.seed[i]) if dropout else branch
            lows.append(scale * torch.nn.functional.linear(torch.nn.functional.linear(low, A[i]), B[i]))
        w = torch.cat([w.dequantize(torch.float32) for w in self.weights]).to(dtype)
        y = torch.nn.functional.linear(x, w) + torch.cat(lows, -1)
        return torch.autograd.grad(y, [t for t in (x, z) if t is not None], torch.cat(dys, -1).to(dtype))


@pytest.mark.parametrize("m,k,rows,ranks,dtype,dropout,with_z", CASES)
def test_outputs_and_gradients(implementation, m, k, rows, ranks, dtype, dropout, with_z):
    skip_beyond_reach(implementation, m, k, sum(rows))
    skip_but_a_sample(implementation, (m, dtype, dropout, with_z) in SAMPLE)
    lists = Lists(k, rows, ranks, dtype)
    x = torch.randn(m, k, dtype=dtype, requires_grad=True)
    z = torch.randn(m, k, dtype=dtype, requires_grad=True) if with_z else None
    dys = [torch.randn(m, n).to(dtype) for n in rows]
    ys = lists.run(x, z, dropout)
    assert all(torch.equal(y, lists.one(i, x, z, dropout)) for i, y in enumerate(ys))
    inputs = [t for t in (x, z) if t is not None]
    grads = torch.autograd.grad(ys, inputs + lists.leaves(), dys)
    with peftk.use("reference"):
        plain, truth = (lists.plain(x, z, dropout, to, dys) for to in (dtype, torch.float64))
    for got, near, true in zip(grads, plain, truth, strict=False):
        assert_no_worse_than_twice_plain(got, near, true)
    singles = torch.autograd.grad([lists.one(i, x, z, dropout) for i in range(len(rows))], lists.leaves(), dys)
    assert all(torch.equal(a, b) for a, b in zip(grads[len(inputs) :], singles, strict=True))


def test_zero_b_is_the_base_bit_for_bit(implementation):
    lists, x = Lists(64, (24, 9), (4, 2)), torch.randn(70, 64)
    lists.B = [torch.zeros_like(b) for b in lists.B]
    bases = nf4_linear(x, lists.weights, lists.bias)
    assert all(torch.equal(a, b) for a, b in zip(lists.run(x, dropout=0.5), bases, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_an_output_that_the_loss_leaves_out(implementation, dropout):
    lists, x = Lists(64, (24, 40, 17), (4, 3, 2)), torch.randn(6, 64, requires_grad=True)
    got = torch.autograd.grad(lists.run(x, dropout=dropout)[1].sum(), (x, *lists.leaves()), allow_unused=True)
    mine = (x, lists.A[1], lists.B[1], lists.bias[1])
    wanted = dict(zip(mine, torch.autograd.grad(lists.one(1, x, dropout=dropout).sum(), mine), strict=True))
    for leaf, grad in zip((x, *lists.leaves()), got, strict=True):
        assert torch.equal(grad, wanted[leaf]) if leaf in wanted else grad is None


def test_only_what_is_wanted_gets_a_gradient(implementation):
    lists, x = Lists(64, (24, 9), (4, 2)), torch.randn(6, 64)
    sum(y.sum() for y in lists.run(x)).backward()
    assert x.grad is None and all(leaf.grad is not None for leaf in lists.leaves())


def test_same_result_for_any_number_of_threads(implementation):
    lists, threads = Lists(320, (200, 37, 64), (8, 16, 3)), torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        x, results = torch.randn(60, 320, dtype=dtype, requires_grad=True), []
        lists.bias = [torch.randn(w.shape[0], dtype=dtype) for w in lists.weights]
        dys = [torch.randn(60, w.shape[0], dtype=dtype) for w in lists.weights]
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            ys = lists.run(x, dropout=0.3)
            results.append((*ys, *torch.autograd.grad(ys, (x, *lists.A, *lists.B), dys)))
        torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), dtype


def test_one_scale_for_all_and_seeds_from_torchs_generator(implementation):
    lists, x = Lists(64, (24, 9), (4, 2)), torch.randn(30, 64)
    torch.manual_seed(1)
    ys = nf4_lora_linear(x, lists.weights, lists.A, lists.B, 0.5, dropout=0.5)
    torch.manual_seed(1)
    for y, *parts in zip(ys, lists.weights, lists.A, lists.B, strict=True):
        assert torch.equal(y, nf4_lora_linear(x, *parts, 0.5, dropout=0.5))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(dropout):
    lists = Lists(10, (6, 3), (2, 1), torch.float64)
    x, z = (torch.randn(3, 10, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def call(x, z, a, b, bias):
        lists.A[1], lists.B[1], lists.bias[1] = a, b, bias
        return tuple(lists.run(x, z, dropout))

    with peftk.use("reference"):
        for branch in (z, None):
            assert torch.autograd.gradcheck(call, (x, branch, lists.A[1], lists.B[1], lists.bias[1]))


def test_gradient_checkpointing_with_dropout(implementation):
    lists, x, grads = Lists(64, (16, 5), (4, 2)), torch.randn(8, 64), []
    call = lambda x: sum(y.square().sum() for y in nf4_lora_linear(x, lists.weights, lists.A, lists.B, 1.0, dropout=0.5))  # noqa: E731
    for checkpointed in (False, True):
        torch.manual_seed(3)
        loss = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False) if checkpointed else call(x)
        grads.append(torch.autograd.grad(loss, (*lists.A, *lists.B)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast(implementation):
    lists, x = Lists(64, (8, 24), (2, 3)), torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        ys = lists.run(x)
    lists.bias = [None if b is None else b.bfloat16() for b in lists.bias]
    assert all(torch.equal(y, lists.one(i, x.bfloat16())) for i, y in enumerate(ys))


def test_compile_and_opcheck():
    lists, x = Lists(64, (8, 24), (2, 3)), torch.randn(4, 64, requires_grad=True)
    tensors = [list(parts) for parts in zip(*(w.tensors() for w in lists.weights), strict=True)]
    facts = (lists.scale, [64, 128], ["nf4", "nf4"], 0.25, lists.seed)
    arguments = (x, *tensors, lists.A, lists.B, lists.bias, None, *facts)
    torch.library.opcheck(torch.ops.peftk.nf4_lora_linear_many.default, arguments)
    compiled = torch.compile(lambda *a: torch.ops.peftk.nf4_lora_linear_many(*a), fullgraph=True)
    results, leaves = [], (x, *lists.leaves())
    for ys in (compiled(*arguments), lists.run(x, dropout=0.25)):
        results.append((*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), leaves)))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*results, strict=True))


def test_bad_arguments_are_named():
    lists, x = Lists(64, (8, 24), (2, 3)), torch.randn(4, 64)
    weights, A, B = lists.weights, lists.A, lists.B
    with pytest.raises(ValueError, match=r"A\[1\]: expected \(r, 64\), got \(3, 63\)"):
        nf4_lora_linear(x, weights, [A[0], A[1][:, 1:]], B, 1.0)
    with pytest.raises(ValueError, match=r"B\[0\]: expected \(8, 2\), got \(8, 1\)"):
        nf4_lora_linear(x, weights, A, [B[0][:, 1:], B[1]], 1.0)
    with pytest.raises(ValueError, match="A: expected a list of 2, one for each weight, got Parameter"):
        nf4_lora_linear(x, weights, torch.nn.Parameter(A[0]), B, 1.0)
    with pytest.raises(ValueError, match="scale: expected a list of 2, one for each weight, got 3 of them"):
        nf4_lora_linear(x, weights, A, B, [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="seed: expected a list of 2, one for each weight, got int"):
        nf4_lora_linear(x, weights, A, B, 1.0, dropout=0.5, seed=3)
    with pytest.raises(ValueError, match=r"z: expected x's shape \(4, 64\)"):
        nf4_lora_linear(x, weights, A, B, 1.0, z=x[1:])
