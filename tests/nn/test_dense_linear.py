"""DenseLinear and DenseConv1D: torch's results and parameters behind the base-layer interface."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from numerics import row_scaled
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peftk.native import native
from peftk.nn import DenseConv1D, DenseLinear
from peftk.ops import philox_dropout


def make(kind: str, bias: bool = True, k: int = 24, n: int = 10):
    """A base layer, the layer that it came from, and W (n, k)."""
    if kind == "linear":
        linear = nn.Linear(k, n, bias=bias)
        linear.weight.data.copy_(row_scaled(n, k))
        return DenseLinear.from_linear(linear), linear, linear.weight.detach().clone()
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(n, k)
    conv1d.weight.data.copy_(row_scaled(n, k).T)
    nn.init.normal_(conv1d.bias)
    return DenseConv1D.from_conv1d(conv1d), conv1d, conv1d.weight.detach().T.clone()


kinds = pytest.mark.parametrize("kind", ["linear", "conv1d"])


@kinds
def test_shares_the_parameters(kind):
    layer, origin, _ = make(kind)
    assert layer.weight is origin.weight and layer.bias is origin.bias
    assert (layer.in_features, layer.out_features) == (24, 10)
    assert list(layer.state_dict()) == list(origin.state_dict()) == ["weight", "bias"]
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert layer.training and not type(layer).__name__.startswith("Linear")


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_keeps_the_mode(kind, training):
    _, origin, _ = make(kind)
    origin.train(training)
    make_layer = DenseLinear.from_linear if kind == "linear" else DenseConv1D.from_conv1d
    assert make_layer(origin).training is training


@kinds
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 5, 24), (0, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_equals_the_origin(kind, shape, dtype):
    layer, origin, _ = make(kind)
    layer.to(dtype)
    x = torch.randn(shape, dtype=dtype)
    y = layer(x)
    assert y.shape == (*shape[:-1], 10) and y.dtype == dtype
    torch.testing.assert_close(y, origin(x))


class Ops(TorchDispatchMode):
    """The names of the ops that ran."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.__dict__.setdefault("names", set()).add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_strides_that_do_not_fold_take_no_batched_product():
    """As those of hidden[:, -1:] in generation, of one sequence or several, and of no row: with a frozen W torch takes bmm, which
    copies it for each."""
    layer, origin, _ = make("linear", bias=False)
    origin.requires_grad_(False)
    for x in (torch.randn(1, 5, 24)[:, -1:], torch.randn(3, 5, 24)[:, -1:], torch.randn(2, 5, 24)[:, :0]):
        with torch.no_grad():
            with Ops() as theirs:
                expected = origin(x)
            with Ops() as ours:
                y = layer(x)
        torch.testing.assert_close(y, expected)
        assert "bmm" not in ours.names and ("bmm" in theirs.names or x.numel() == 0)


@kinds
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24), (2, 24), (4, 1, 24), (3, 8, 24), (17, 24)], ids=str)
def test_a_few_rows_in_bf16(kind, bias, shape):
    """W x^T: as close as x W^T, of the same shape, contiguous; with gradients torch's linear."""
    layer, origin, _ = make(kind) if bias or kind == "conv1d" else make(kind, bias=False)
    layer, origin, x = layer.bfloat16(), origin.bfloat16(), torch.randn(shape).bfloat16()
    with torch.no_grad():
        y, expected = layer(x), origin(x)
    assert y.is_contiguous() and y.shape == (*shape[:-1], 10) and y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=8e-3, atol=8e-3)
    assert layer(x).requires_grad


def test_a_few_rows_under_autocast():
    layer = DenseLinear.from_linear(nn.Linear(24, 10)).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert layer(torch.randn(2, 24).bfloat16()).dtype == torch.float16


def test_no_bias():
    layer, linear, w = make("linear", bias=False)
    assert layer.bias is None and list(layer.state_dict()) == ["weight"]
    x = torch.randn(3, 24)
    assert torch.equal(layer(x), linear(x))
    conv1d = DenseConv1D(nn.Parameter(w.T.clone()), None)
    torch.testing.assert_close(conv1d(x), x @ w.T)
    assert list(conv1d.state_dict()) == ["weight"]


@kinds
@pytest.mark.parametrize("separate_z", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_forward_low_rank(kind, separate_z, dropout):
    """Against the formula in fp64, with every gradient."""
    layer, _, w = make(kind)
    r, scale, seed = 4, 1.7, 11
    given = [torch.randn(5, 24), torch.randn(5, 24), torch.randn(r, 24), torch.randn(10, r)]
    leaves = [t.clone().requires_grad_() for t in given]
    wide = [t.double().requires_grad_() for t in given]
    x, z, A, B = leaves
    y = layer.forward_low_rank(x, A, B, scale, z if separate_z else None, dropout, seed)
    x64, z64, A64, B64 = wide
    kept = (philox_dropout(torch.ones(5, 24), dropout, seed) if dropout else torch.ones(5, 24)).double()
    branch = (z64 if separate_z else x64) * kept
    w64, bias64 = w.double().requires_grad_(), layer.bias.detach().double().requires_grad_()
    expected = x64 @ w64.T + bias64 + scale * (branch @ A64.T) @ B64.T
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-3)
    dy = torch.randn(5, 10)
    y.backward(dy), expected.backward(dy.double())
    own = layer.weight.grad if kind == "linear" else layer.weight.grad.T
    for leaf, truth in [(t.grad, u.grad) for t, u in zip(leaves, wide, strict=True)] + [
        (own, w64.grad),
        (layer.bias.grad, bias64.grad),
    ]:
        if truth is None:
            assert leaf is None and not separate_z
        else:
            torch.testing.assert_close(leaf.double(), truth, rtol=1e-4, atol=1e-3)


@kinds
def test_a_zero_b_changes_nothing(kind):
    layer, _, _ = make(kind)
    x = torch.randn(5, 24)
    torch.testing.assert_close(layer.forward_low_rank(x, torch.randn(4, 24), torch.zeros(10, 4), 2.0), layer(x))


@kinds
def test_one_op_where_there_is_a_kernel(kind, monkeypatch):
    """The op for whatever its kernel takes; torch's products for fp64, for weights of another class, and without kernels."""
    layer, _, _ = make(kind)
    A, B = torch.randn(4, 24, requires_grad=True), torch.randn(10, 4)
    graph = lambda x: type(layer.to(x.dtype).forward_low_rank(x, A, B, 1.0).grad_fn).__name__  # noqa: E731
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if native() else ():
        assert "LoraLinear" in graph(torch.randn(3, 24, dtype=dtype))
    assert "LoraLinear" not in graph(torch.randn(3, 24, dtype=torch.float64))
    monkeypatch.setattr(sys.modules["peftk.ops.lora_linear"], "native", lambda: None)
    assert "LoraLinear" not in graph(torch.randn(3, 24))
    layer.weight = nn.Parameter(torch.Tensor._make_subclass(type("Other", (torch.Tensor,), {}), layer.weight.detach()))
    monkeypatch.undo()
    assert "LoraLinear" not in graph(torch.randn(3, 24))


def test_dropout_seed():
    layer, _, _ = make("linear")
    x, A, B = torch.randn(5, 24), torch.randn(4, 24), torch.randn(10, 4)
    run = lambda seed: layer.forward_low_rank(x, A, B, 1.0, dropout=0.5, seed=seed)  # noqa: E731
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    torch.manual_seed(5)
    drawn = [run(None), run(None)]
    torch.manual_seed(5)
    assert torch.equal(run(None), drawn[0]) and not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_x_with_fp32_factors(dtype):
    layer, _, w = make("linear")
    layer.to(dtype)
    x, A, B = torch.randn(5, 24, dtype=dtype), torch.randn(4, 24, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    y = layer.forward_low_rank(x, A, B, 0.5)
    assert y.dtype == dtype
    expected = layer(x).float() + 0.5 * (x.float() @ A.T) @ B.T
    assert (y.float() - expected).norm() < 0.02 * expected.norm()
    y.sum().backward()
    assert A.grad.dtype == B.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.zeros(4, 23)}, r"A: expected \(r, 24\), got \(4, 23\)"),
        ({"B": torch.zeros(10, 3)}, r"B: expected \(10, 4\), got \(10, 3\)"),
        ({"z": torch.zeros(4, 24)}, r"z: expected x's shape \(5, 24\)"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
    ],
)
def test_refuses(change, message):
    arguments = {"A": torch.zeros(4, 24), "B": torch.zeros(10, 4), "scale": 1.0} | change
    with pytest.raises(ValueError, match=message):
        make("linear")[0].forward_low_rank(torch.zeros(5, 24), **arguments)


@kinds
def test_dense_weight_and_back(kind):
    layer, origin, w = make(kind)
    assert torch.equal(layer.dense_weight(), w) and not layer.dense_weight().requires_grad
    parameter, new = layer.weight, row_scaled(10, 24)
    layer.set_dense_weight(new)
    assert layer.weight is parameter is origin.weight and torch.equal(layer.dense_weight(), new)
    layer.to(torch.bfloat16)
    layer.set_dense_weight(new)
    assert torch.equal(layer.dense_weight(), new.bfloat16())  # one rounding
    with pytest.raises(ValueError, match=r"w: expected \(10, 24\), got \(24, 10\)"):
        layer.set_dense_weight(torch.zeros(24, 10))


@kinds
def test_snapshot_and_restore(kind):
    layer, _, w = make(kind)
    layer.weight.data[0, 0], w[0, 0] = float("nan"), float("nan")
    layer.weight.data[1, 1], w[1, 1] = -0.0, -0.0
    snapshot = layer.weight_snapshot()
    layer.set_dense_weight(torch.zeros(10, 24))
    layer.restore_weight(snapshot)
    assert torch.equal(layer.dense_weight().contiguous().view(torch.int32), w.view(torch.int32))
    assert torch.equal(layer.weight.detach().view(torch.int32), snapshot.view(torch.int32))
    layer.set_dense_weight(torch.ones(10, 24))
    assert snapshot.isnan().sum() == 1  # a copy


@kinds
def test_deepcopy_is_independent(kind):
    layer, _, w = make(kind)
    other = copy.deepcopy(layer)
    other.set_dense_weight(torch.zeros(10, 24))
    assert torch.equal(layer.dense_weight(), w)
