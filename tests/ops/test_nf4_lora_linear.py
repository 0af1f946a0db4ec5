"""nf4_lora_linear, forward and all gradients, against fp64; dropout's mask against philox_dropout."""

from __future__ import annotations

import pytest
import torch
from low_rank import DTYPES, SCALE, SEED, SHAPES, assert_forward_and_gradients
from numerics import row_scaled

import peftk
from peftk.ops import nf4_linear, nf4_lora_linear


@pytest.mark.parametrize("with_z", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m,k,n,r", SHAPES)
def test_forward_and_gradients(implementation, m, k, n, r, dtype, dropout, with_z):
    w4 = peftk.quantize_nf4(row_scaled(n, k) / k**0.5, double_quant=n % 2 == 0)
    op = lambda x, A, B, bias, z: nf4_lora_linear(x, w4, A, B, SCALE, bias, z, dropout, SEED)  # noqa: E731
    assert_forward_and_gradients(op, w4.dequantize(torch.float32), m, r, dtype, dropout, with_z)


def test_fp32_factors_beside_16_bit_activations(implementation):
    w4 = peftk.quantize_nf4(row_scaled(32, 64))
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    y = nf4_lora_linear(x, w4, A, B, 2.0)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and A.grad.dtype == B.grad.dtype == torch.float32
    truth = x.double() @ w4.dequantize(torch.float32).double().T + 2 * (x.double() @ A.double().T @ B.double().T)
    assert (y.double() - truth).norm() / truth.norm() < 0.01


def test_zero_b_is_the_base_bit_for_bit(implementation):
    w4, bias = peftk.quantize_nf4(row_scaled(48, 96)), torch.randn(48)
    for dtype in DTYPES:
        x = torch.randn(7, 96, dtype=dtype)
        y = nf4_lora_linear(x, w4, torch.randn(8, 96), torch.zeros(48, 8), 2.0, bias)
        assert torch.equal(y, nf4_linear(x, w4, bias))


def test_only_what_is_wanted_gets_a_gradient(implementation):
    w4 = peftk.quantize_nf4(row_scaled(16, 64))
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    x = torch.randn(3, 64)
    nf4_lora_linear(x, w4, A, B, 1.0).sum().backward()
    assert x.grad is None and A.grad is not None and B.grad is not None


def test_saves_only_x_and_s(implementation):
    """What the graph keeps beside the weight's own bytes and the factors is x and S (m, r)."""
    w4 = peftk.quantize_nf4(row_scaled(64, 128))
    x, A, B = (torch.randn(*s, requires_grad=True) for s in ((9, 128), (4, 128), (64, 4)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        nf4_lora_linear(x, w4, A, B, 1.0, dropout=0.5, seed=1)
    known = {t.data_ptr() for t in (x, A, B, *w4.tensors())}
    extra = [tuple(t.shape) for t in kept if t.data_ptr() not in known]
    assert extra == [(9, 4)]


def test_seed_from_torchs_generator(implementation):
    w4 = peftk.quantize_nf4(row_scaled(16, 64))
    x, A, B = torch.randn(30, 64), torch.randn(4, 64), torch.randn(16, 4)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(nf4_lora_linear(x, w4, A, B, 1.0, dropout=0.5))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(dropout):
    w4 = peftk.quantize_nf4(row_scaled(6, 10))
    shapes = ((3, 10), (2, 10), (6, 2), (6,), (3, 10))
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
    with peftk.use("reference"):
        for with_z in (True, False):
            given = leaves if with_z else leaves[:4]
            call = lambda x, A, B, b, z=None: nf4_lora_linear(x, w4, A, B, 0.7, b, z, dropout, 5)  # noqa: E731
            assert torch.autograd.gradcheck(call, given)


def test_gradient_checkpointing_with_dropout(implementation):
    w4 = peftk.quantize_nf4(row_scaled(16, 64))
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    x, grads = torch.randn(8, 64), []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        call = lambda x: nf4_lora_linear(x, w4, A, B, 1.0, dropout=0.5)  # noqa: E731
        y = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False) if checkpointed else call(x)
        grads.append(torch.autograd.grad(y.square().sum(), (A, B)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compile_and_opcheck():
    w4 = peftk.quantize_nf4(row_scaled(8, 64))
    x, A, B, bias = (torch.randn(*s, requires_grad=True) for s in ((4, 64), (2, 64), (8, 2), (8,)))
    arguments = (x, *w4.tensors(), A, B, bias, None, 0.5, 64, "nf4", 0.25, 3)
    torch.library.opcheck(torch.ops.peftk.nf4_lora_linear.default, arguments)
    eager = torch.ops.peftk.nf4_lora_linear(*arguments)
    y = torch.compile(lambda *a: torch.ops.peftk.nf4_lora_linear(*a), fullgraph=True)(*arguments)
    assert torch.allclose(y, eager)
    for a, b in zip(*(torch.autograd.grad(v.square().sum(), (x, A, B, bias)) for v in (y, eager)), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_bad_arguments_are_named():
    w4, x = peftk.quantize_nf4(row_scaled(8, 64)), torch.randn(4, 64)
    A, B = torch.randn(2, 64), torch.randn(8, 2)
    with pytest.raises(ValueError, match=r"A: expected \(r, 64\), got \(2, 63\)"):
        nf4_lora_linear(x, w4, A[:, 1:], B, 1.0)
    with pytest.raises(ValueError, match=r"B: expected \(8, 2\), got \(8, 1\)"):
        nf4_lora_linear(x, w4, A, B[:, 1:], 1.0)
    with pytest.raises(ValueError, match=r"z: expected x's shape \(4, 64\) and torch.float32, got \(3, 64\)"):
        nf4_lora_linear(x, w4, A, B, 1.0, z=x[1:])
    with pytest.raises(ValueError, match=r"dropout: expected a probability in \[0, 1\), got 1"):
        nf4_lora_linear(x, w4, A, B, 1.0, dropout=1)
