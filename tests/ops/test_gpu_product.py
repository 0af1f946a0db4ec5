"""Every regime of a product on a GPU by every backend's kernels, whatever the table would choose: y and all gradients of
nf4_lora_linear against fp64, single and listed."""

from __future__ import annotations

import importlib

import pytest
import torch
from low_rank import SCALE, SEED, assert_forward_and_gradients
from numerics import assert_no_worse_than_twice_plain, row_scaled

import peftk
from peftk.ops import gpu, gpu_product, nf4_linear, nf4_lora_linear, regimes

DOORS = ("cuda-host", "cuda-ptx", "triton-ptx")
# m, k, n, r, and blocks that hold together: a split, the last run of it shorter; ragged n and m, several tiles of each.
TENSOR = [
    ("few", 8, (5, 1088, 50, 8)),
    ("tile", 16, (14, 1088, 130, 16)),
    ("tile", 32, (35, 576, 144, 1)),
    ("tile", 64, (66, 640, 18, 64)),
    ("tile", 128, (130, 192, 200, 8)),
]
ANY = [
    ("chunks", 0, (17, 320, 50, 8)),
    ("chunks", 0, (5, 33, 15, 4)),
    ("simple", 8, (3, 1088, 70, 8)),
    ("simple", 64, (70, 80, 66, 16)),
]


@pytest.fixture(params=DOORS)
def backend(request: pytest.FixtureRequest):
    """ "cuda" or "triton", forced, behind one of the doors that need no GPU."""
    doors = importlib.import_module("emulation.doors")
    if why := doors.why_not(request.param):
        pytest.skip(why)
    name = request.param.partition("-")[0]
    with gpu.through(name, doors.door(request.param)), peftk.use(name):
        yield name


def forced(regime: str, tokens: int):
    """The backward pass has no kernel of its own for few rows."""
    columns = {"regime": regime, "blocks": 1, "chunk_mb": 1} | ({"tokens": tokens} if tokens else {})
    return regimes.forced(**columns)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("regime,tokens,shape", [*TENSOR, *ANY])
def test_16_bit(backend, regime, tokens, shape, dtype, dropout):
    m, k, n, r = shape
    w4 = peftk.quantize_nf4(row_scaled(n, k) / k**0.5, double_quant=dropout > 0, quant_type="fp4" if m % 2 else "nf4")
    op = lambda x, A, B, bias, z: nf4_lora_linear(x, w4, A, B, SCALE, bias, z, dropout, SEED)  # noqa: E731
    if regime == "few":
        x, bias = torch.randn(m, k, dtype=dtype), torch.randn(n, dtype=dtype)
        with forced(regime, tokens):
            y = nf4_linear(x, w4, bias)
        w = w4.dequantize(torch.float32)
        truth = x.double() @ w.double().T + bias.double()
        assert_no_worse_than_twice_plain(y, torch.nn.functional.linear(x, w.to(dtype), bias), truth)
        return
    with forced(regime, tokens):
        assert_forward_and_gradients(op, w4.dequantize(torch.float32), m, r, dtype, dropout, with_z=m % 3 == 0)


@pytest.mark.parametrize("regime,tokens,shape", ANY)
def test_32_bit(backend, regime, tokens, shape):
    m, k, n, r = shape
    w4 = peftk.quantize_nf4(row_scaled(n, k) / k**0.5)
    op = lambda x, A, B, bias, z: nf4_lora_linear(x, w4, A, B, SCALE, bias, z, 0.3, SEED)  # noqa: E731
    with forced(regime, tokens):
        assert_forward_and_gradients(op, w4.dequantize(torch.float32), m, r, torch.float32, 0.3, with_z=False)


@pytest.mark.parametrize("regime", ["tile", "chunks", "simple"])
def test_a_list_is_its_single_calls(backend, regime):
    m, k, rows = 12, 576, (40, 144, 3)
    weights = [peftk.quantize_nf4(row_scaled(n, k), double_quant=n > 50) for n in rows]
    x = torch.randn(m, k, dtype=torch.bfloat16)
    with forced(regime, 16):
        ys = nf4_linear(x, weights)
        assert all(torch.equal(y, nf4_linear(x, w)) for y, w in zip(ys, weights, strict=True))


def test_a_weight_that_tensor_kernels_do_not_take_goes_its_own_way(backend):
    """Blocks of 32 in a list with blocks of 64."""
    weights = [peftk.quantize_nf4(row_scaled(20, 128), size) for size in (64, 32)]
    x = torch.randn(9, 128, dtype=torch.bfloat16, requires_grad=True)
    ys = nf4_linear(x, weights)
    assert all(torch.equal(y, nf4_linear(x, w)) for y, w in zip(ys, weights, strict=True))
    dys = [torch.randn_like(y) for y in ys]
    (dx,) = torch.autograd.grad(ys, x, dys)
    dense = [w.dequantize(torch.float32) for w in weights]
    plain = torch.cat(dys, 1) @ torch.cat(dense).bfloat16()
    assert_no_worse_than_twice_plain(dx, plain, torch.cat(dys, 1).double() @ torch.cat(dense).double())


def test_no_more_of_w_than_a_chunk_is_ever_decoded(backend, monkeypatch):
    """1 MB of workspace for a W of 2.25 MB in bf16, forward and backward."""
    sizes, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: sizes.append((made := empty(*a, **k)).nbytes) or made)
    w4 = peftk.quantize_nf4(row_scaled(768, 1536))
    x = torch.randn(2, 1536, dtype=torch.bfloat16, requires_grad=True)
    with forced("chunks", 0):
        nf4_linear(x, w4).sum().backward()
    assert max(sizes) <= 1 << 20


def test_rows_that_are_not_aligned_are_copied():
    wide = torch.randn(4, 132, dtype=torch.bfloat16)
    assert gpu_product.padded(wide[:, :128]).data_ptr() != wide.data_ptr(), "rows 264 bytes apart"
    whole = torch.randn(4, 136, dtype=torch.bfloat16)
    assert gpu_product.padded(whole[:, :128]).data_ptr() == whole.data_ptr(), "rows 272 bytes apart are left in place"
    assert gpu_product.is_aligned(gpu_product.padded(torch.randn(3, 5)))
    assert torch.equal(gpu_product.padded(wide[:, 1:6]), wide[:, 1:6])


def test_a_list_beyond_a_launch_is_refused_by_name(backend):
    weights = [peftk.quantize_nf4(row_scaled(2, 64))] * 17
    with pytest.raises(RuntimeError, match=rf"{backend}: a list of 17 weights, a launch takes 16"):
        nf4_linear(torch.randn(1, 64), weights)
