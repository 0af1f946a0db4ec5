"""use_int8_activations and NF4Linear.int8_activations: who rounds, when, and who never does."""

from __future__ import annotations

import contextlib
import copy
import io
import threading

import pytest
import torch
from numerics import row_scaled
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftk
from peftk.nn import NF4Linear
from peftk.nn.dense_linear import add_low_rank
from peftk.ops import nf4_linear, nf4_linear_int8, nf4_lora_linear


def layer(int8_activations: bool = False, **facts) -> NF4Linear:
    made = NF4Linear(64, 12, int8_activations=int8_activations, **facts)
    made.set_dense_weight(row_scaled(12, 64))
    return made.eval()


def exact(of: NF4Linear, x: torch.Tensor) -> torch.Tensor:
    return nf4_linear(x, of.w4, of.bias)


def rounded(of: NF4Linear, x: torch.Tensor) -> torch.Tensor:
    return nf4_linear_int8(x, of.w4, of.bias)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 64)


@torch.no_grad()
def test_attribute_and_context(x):
    plain, int8 = layer(), layer(True)
    assert torch.equal(plain(x), exact(plain, x)) and torch.equal(int8(x), rounded(int8, x))
    assert not torch.equal(exact(int8, x), rounded(int8, x))
    with peftk.use_int8_activations():
        assert torch.equal(plain(x), rounded(plain, x)) and torch.equal(int8(x), rounded(int8, x))
        with peftk.use_int8_activations(False):
            assert torch.equal(plain(x), exact(plain, x)) and torch.equal(int8(x), exact(int8, x))
        assert torch.equal(plain(x), rounded(plain, x))
        assert torch.equal(nf4_linear(x, plain.w4, plain.bias), exact(plain, x))  # the function is what its name says
    assert torch.equal(plain(x), exact(plain, x)) and torch.equal(int8(x), rounded(int8, x))
    plain.int8_activations = True
    assert torch.equal(plain(x), rounded(plain, x))


@torch.no_grad()
def test_the_context_ends_with_an_error(x):
    plain = layer()
    with pytest.raises(KeyError), peftk.use_int8_activations():
        raise KeyError
    assert torch.equal(plain(x), exact(plain, x))


@torch.no_grad()
def test_the_context_is_the_threads_own(x):
    plain, results = layer(), []
    with peftk.use_int8_activations():
        thread = threading.Thread(target=torch.no_grad()(lambda: results.append(plain(x))))
        thread.start()
        thread.join()
    assert torch.equal(results[0], exact(plain, x))


@pytest.mark.parametrize("by_context", [False, True])
def test_training_is_exact(x, by_context):
    int8 = layer(not by_context)
    with peftk.use_int8_activations() if by_context else contextlib.nullcontext():
        assert torch.equal(int8(x), exact(int8, x))  # the bias wants a gradient
        int8.requires_grad_(False)
        assert torch.equal(int8(x), rounded(int8, x))
        leaf = x.clone().requires_grad_()
        y = int8(leaf)
        assert torch.equal(y, exact(int8, x)) and torch.autograd.grad(y.sum(), leaf)[0].isfinite().all()
        with torch.no_grad():
            assert torch.equal(int8(leaf), rounded(int8, x))
            assert torch.equal(int8.train()(x), exact(int8, x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_exact(x, reentrant):
    """A reentrant checkpoint's first pass runs without gradients, in training mode."""
    int8, leaf = layer(True).train(), x.clone().requires_grad_()
    assert torch.equal(checkpoint(int8, leaf, use_reentrant=reentrant), exact(int8, x))


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("with_z", [False, True])
def test_forward_low_rank(x, with_z, compute_dtype):
    int8 = layer(True, compute_dtype=compute_dtype)
    A, B, z = torch.randn(4, 64, requires_grad=True), torch.randn(12, 4), torch.randn(3, 64) if with_z else None
    h, branch = (t if t is None or compute_dtype is None else t.to(compute_dtype) for t in (x, z))
    expected = nf4_lora_linear(h, int8.w4, A, B, 0.5, int8.bias, branch).to(x.dtype)
    assert torch.equal(int8.forward_low_rank(x, A, B, 0.5, z), expected)  # A wants a gradient
    with torch.no_grad():
        y = int8.forward_low_rank(x, A, B, 0.5, z)
        base = nf4_linear_int8(h, int8.w4, int8.bias)
        assert y.dtype == x.dtype and torch.equal(y, add_low_rank(base, h, A, B, 0.5, branch, 0.0, None).to(x.dtype))
        assert torch.equal(int8.train().forward_low_rank(x, A, B, 0.5, z), expected)


@torch.no_grad()
def test_a_model_with_adapters(x):
    model = nn.Sequential(nn.Linear(64, 12), nn.Linear(12, 12))
    peftk.quantize_model(model, skip=("1",))
    peftk.attach(model, peftk.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.eval()
    plain = model(x)
    with peftk.use_int8_activations():
        y = model(x)
    assert not torch.equal(y, plain) and (y - plain).norm() < 0.05 * plain.norm()
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.int8_activations = True
    assert torch.equal(model(x), y)
    with peftk.disable_adapters(model):
        assert not torch.equal(model(x), y)


def test_what_holds_the_attribute(x):
    int8 = layer(True)
    assert "int8_activations" in repr(int8) and "int8_activations" not in repr(layer())
    assert not any("int8" in key for key in int8.state_dict())
    buffer = io.BytesIO()
    torch.save(int8, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(int8), torch.load(buffer, weights_only=False), int8.bfloat16()):
        assert other.int8_activations
    fresh = layer()
    fresh.load_state_dict(int8.state_dict())
    assert not fresh.int8_activations
    assert NF4Linear.from_linear(nn.Linear(64, 3), int8_activations=True).int8_activations
    assert not NF4Linear.from_linear(nn.Linear(64, 3)).int8_activations


@torch.no_grad()
def test_compile(x):
    """The attribute compiles into one graph and may change; the context breaks the graph, right in any case."""
    torch.compiler.reset()
    int8 = layer(True)
    whole = torch.compile(int8, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(x), rounded(int8, x))
    int8.int8_activations = False
    assert torch.equal(whole(x), exact(int8, x))
    with peftk.use_int8_activations(), pytest.raises(torch._dynamo.exc.Unsupported, match="ContextVar"):
        whole(x)
    assert torch.equal(whole(x), exact(int8, x))
    torch.compiler.reset()
    broken = torch.compile(int8, backend="aot_eager")
    assert torch.equal(broken(x), exact(int8, x))
    with peftk.use_int8_activations():
        assert torch.equal(broken(x), rounded(int8, x))
        with peftk.use_int8_activations(False):
            assert torch.equal(broken(x), exact(int8, x))
    assert torch.equal(broken(x), exact(int8, x))
