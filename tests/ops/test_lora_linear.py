"""lora_linear, forward and all gradients, against fp64 and against HF peft's layer."""

from __future__ import annotations

import pytest
import torch
from low_rank import DTYPES, SCALE, SEED, SHAPES, assert_forward_and_gradients
from numerics import row_scaled

import peftk
from peftk.ops import lora_linear

# More than one block of rows, and depths beyond one panel, in either direction.
LARGE = [(530, 40, 24, 8), (9, 5300, 17, 4), (9, 17, 5300, 4)]


def laid_out(w: torch.Tensor, layout: str) -> torch.Tensor:
    """The same W: "rows" side by side, "columns" side by side as in Conv1D, or "strided" in both."""
    if layout == "columns":
        return w.T.contiguous().T
    return torch.stack((w, torch.full_like(w, float("nan"))), -1)[..., 0] if layout == "strided" else w


@pytest.mark.parametrize("with_z", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m,k,n,r", SHAPES)
def test_forward_and_gradients(implementation, m, k, n, r, dtype, dropout, with_z):
    w = laid_out((row_scaled(n, k) / k**0.5).to(dtype), "columns" if n % 16 else "rows")
    op = lambda x, A, B, bias, z: lora_linear(x, w, A, B, SCALE, bias, z, dropout, SEED)  # noqa: E731
    assert_forward_and_gradients(op, w, m, r, dtype, dropout, with_z)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m,k,n,r", LARGE)
def test_beyond_one_block(implementation, m, k, n, r, dtype, layout):
    w = laid_out((row_scaled(n, k) / k**0.5).to(dtype), layout)
    op = lambda x, A, B, bias, z: lora_linear(x, w, A, B, SCALE, bias, z, 0.3, SEED)  # noqa: E731
    assert_forward_and_gradients(op, w, m, r, dtype, 0.3, False)


@pytest.mark.parametrize("layout", ["rows", "columns", "strided", "slice"])
@pytest.mark.parametrize("m", [2, 21])
def test_layouts_of_the_weight(implementation, m, layout):
    w, x = row_scaled(50, 70).bfloat16(), torch.randn(m, 70).bfloat16().requires_grad_()
    A, B, dy = torch.randn(4, 70), torch.randn(50, 4), torch.randn(m, 50).bfloat16()
    given = torch.cat((w, w), 1)[:, 70:] if layout == "slice" else laid_out(w, layout)
    y = lora_linear(x, given, A, B, 0.1)
    expected = lora_linear(x, w, A, B, 0.1)
    torch.testing.assert_close(y, expected, rtol=0.01, atol=1e-3 * expected.abs().max().item())
    dx, dx_expected = (torch.autograd.grad(v, x, dy)[0] for v in (y, expected))
    torch.testing.assert_close(dx, dx_expected, rtol=0.01, atol=1e-3 * dx_expected.abs().max().item())


def test_shapes_and_strides_of_x(implementation):
    w, A, B = row_scaled(24, 64), torch.randn(4, 64), torch.randn(24, 4)
    run = lambda x, z=None: lora_linear(x, w, A, B, 0.5, z=z)  # noqa: E731
    x = torch.randn(3, 64, 5).transpose(1, 2)
    torch.testing.assert_close(run(x), run(x.reshape(15, 64)).view(3, 5, 24))
    assert run(torch.randn(64)).shape == (24,)
    wide = torch.randn(16, 128)
    torch.testing.assert_close(run(wide[:, ::2]), run(wide[:, ::2].contiguous()))
    x, z = wide[:8, :64], wide[::2, :64]  # z begins where x does
    torch.testing.assert_close(run(x, z), run(x.clone(), z.clone()))


def test_fp32_factors_beside_16_bit_activations(implementation):
    w, x = row_scaled(32, 64).bfloat16(), torch.randn(5, 64, dtype=torch.bfloat16)
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    y = lora_linear(x, w, A, B, 2.0)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and A.grad.dtype == B.grad.dtype == torch.float32
    truth = x.double() @ w.double().T + 2 * (x.double() @ A.double().T @ B.double().T)
    assert (y.double() - truth).norm() / truth.norm() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [3, 40])
def test_hf_peft_agrees(implementation, m, dtype):
    peft = pytest.importorskip("peft")
    linear = torch.nn.Linear(96, 56, dtype=dtype)
    linear.weight.data.copy_(row_scaled(56, 96))
    model = torch.nn.Sequential(linear)
    config = peft.LoraConfig(r=8, lora_alpha=12, target_modules=["0"], init_lora_weights=False)
    layer = peft.inject_adapter_in_model(config, model)[0]
    theirs = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    x, dy = torch.randn(m, 96, dtype=dtype, requires_grad=True), torch.randn(m, 56, dtype=dtype)
    A, B = (t.detach().clone().requires_grad_() for t in theirs)
    y, expected = lora_linear(x, linear.weight.detach(), A, B, 1.5, linear.bias.detach()), layer(x)
    results = (y, *torch.autograd.grad(y, (x, A, B), dy))
    wanted = (expected, *torch.autograd.grad(expected, (x, *theirs), dy))
    wide = [t.detach().double().requires_grad_() for t in (x, A, B)]
    y64 = wide[0] @ linear.weight.detach().double().T + linear.bias.double() + 1.5 * (wide[0] @ wide[1].T) @ wide[2].T
    truths = (y64.detach(), *torch.autograd.grad(y64, wide, dy.double()))
    for result, theirs, truth in zip(results, wanted, truths, strict=True):
        assert result.dtype == theirs.dtype
        # Beside bf16 x HF peft computes the branch in fp32, ours rounds its factors to bf16; both round y and dx.
        bound = 2e-6 if dtype == torch.float32 else 6e-3
        for distance in (result.double() - truth, result.double() - theirs.double()):
            assert distance.norm() <= bound * truth.norm()


def test_a_trained_weight_gets_its_gradient(implementation):
    for with_z in (False, True):
        x, w, A, B, dy = (torch.randn(*s) for s in ((2, 6, 40), (24, 40), (4, 40), (24, 4), (2, 6, 24)))
        w.requires_grad_()
        lora_linear(x, w, A, B, 0.5, z=x.sin() if with_z else None, dropout=0.5, seed=1).backward(dy)
        torch.testing.assert_close(w.grad, dy.reshape(12, 24).T @ x.reshape(12, 40))


def test_only_what_is_wanted_gets_a_gradient(implementation):
    x, w = torch.randn(3, 64), row_scaled(16, 64)
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    lora_linear(x, w, A, B, 1.0).sum().backward()
    assert x.grad is None and w.grad is None and A.grad is not None and B.grad is not None


def test_saves_only_x_and_s(implementation):
    """What the graph keeps beside the weight and the factors is x and S (m, r)."""
    x, w, A, B = (torch.randn(*s) for s in ((9, 128), (64, 128), (4, 128), (64, 4)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(x.requires_grad_(), w, A.requires_grad_(), B.requires_grad_(), 1.0, dropout=0.5, seed=1)
    known = {t.data_ptr() for t in (x, w, A, B)}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in known] == [(9, 4)]


def test_seed_from_torchs_generator(implementation):
    x, w, A, B = torch.randn(30, 64), row_scaled(16, 64), torch.randn(4, 64), torch.randn(16, 4)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(lora_linear(x, w, A, B, 1.0, dropout=0.5))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_same_result_for_any_number_of_threads(implementation):
    w, threads, results = row_scaled(200, 300).bfloat16(), torch.get_num_threads(), []
    x, A, B = (torch.randn(*s).requires_grad_() for s in ((70, 300), (4, 300), (200, 4)))
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = lora_linear(x.bfloat16(), w, A, B, 1.0, dropout=0.1, seed=2)
            results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, A, B))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(dropout):
    shapes = ((3, 10), (6, 10), (2, 10), (6, 2), (6,), (3, 10))
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
    with peftk.use("reference"):
        for given in (leaves, leaves[:5]):
            call = lambda x, w, A, B, b, z=None: lora_linear(x, w, A, B, 0.7, b, z, dropout, 5)  # noqa: E731
            assert torch.autograd.gradcheck(call, given)


def test_autocast(implementation):
    x, w, A, B, z = (torch.randn(*s) for s in ((6, 64), (24, 64), (4, 64), (24, 4), (6, 64)))
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, w, A, B, 0.5, torch.ones(24), z)
    assert torch.equal(y, lora_linear(x.bfloat16(), w.bfloat16(), A, B, 0.5, torch.ones(24), z.bfloat16()))


def test_compile_and_opcheck():
    x, w, A, B, bias = (torch.randn(*s, requires_grad=True) for s in ((4, 64), (8, 64), (2, 64), (8, 2), (8,)))
    for weight in (w.detach(), w):
        arguments = (x, weight, A, B, bias, None, 0.5, 0.25, 3)
        torch.library.opcheck(torch.ops.peftk.lora_linear.default, arguments)
        eager = torch.ops.peftk.lora_linear(*arguments)
        y = torch.compile(lambda *a: torch.ops.peftk.lora_linear(*a), fullgraph=True)(*arguments)
        assert torch.allclose(y, eager)
        wanted = [t for t in (x, weight, A, B, bias) if t.requires_grad]
        for a, b in zip(*(torch.autograd.grad(v.square().sum(), wanted) for v in (y, eager)), strict=True):
            assert torch.allclose(a, b, atol=1e-4)


def test_bad_arguments_are_named():
    x, w, A, B = torch.randn(4, 64), torch.randn(8, 64), torch.randn(2, 64), torch.randn(8, 2)
    for change, error, message in (
        ({"weight": w[0]}, ValueError, r"weight: expected shape \(n, k\), got \(64,\)"),
        ({"x": x[:, 1:]}, ValueError, r"x: expected \(..., 64\) for a weight of shape \(8, 64\), got \(4, 63\)"),
        ({"x": x.bfloat16()}, TypeError, r"x: expected the weight's torch.float32, got torch.bfloat16"),
        ({"weight": w.int()}, TypeError, r"weight: expected a floating-point tensor, got torch.int32"),
        ({"weight": w.to("meta")}, ValueError, r"x: expected on the weight's meta, got cpu"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias: expected shape \(8,\), got \(7,\)"),
        ({"A": A[:, 1:]}, ValueError, r"A: expected \(r, 64\), got \(2, 63\)"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected a probability in \[0, 1\), got 1"),
    ):
        with pytest.raises(error, match=message):
            lora_linear(**({"x": x, "weight": w, "A": A, "B": B, "scale": 1.0} | change))
