"""torch.ops.bitsandbytes on a CPU by peftk's kernels, and the functions and optimizers that stand on them."""

from __future__ import annotations

import pytest
import torch
from numerics import row_scaled

import peftk
from peftk.format.code4 import BLOCK_SIZES, values4
from peftk.format.dynamic8 import values8


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize_and_dequantize_4bit(bnb, quant_type: str, block_size: int):
    """The reference's bytes, in every storage; and the same values back."""
    F, w = bnb.functional, row_scaled(7, 810)
    w[3] = 0
    with peftk.use("reference"):
        packed, absmax = peftk.ops.nf4_quantize(w, block_size, quant_type)
        wanted = peftk.ops.nf4_dequantize(packed, absmax, None, None, w.shape, block_size, quant_type)
    got, state = F.quantize_4bit(w, blocksize=block_size, quant_type=quant_type)
    assert got.shape == (2835, 1) and torch.equal(got.view(-1), packed) and torch.equal(state.absmax, absmax)
    back, out = F.dequantize_4bit(got, state), torch.empty(7, 810)
    assert torch.equal(back, wanted) and not back[3].any()
    assert F.dequantize_4bit(got, state, out=out) is out and torch.equal(out, wanted)
    assert torch.equal(F.dequantize_4bit(got.t(), state), wanted.t())  # a transposed parameter gives a transposed weight
    strided = torch.empty(810, 7).t()
    torch.ops.bitsandbytes.dequantize_4bit.out(got, absmax, block_size, quant_type, w.shape, torch.float32, out=strided)
    assert torch.equal(strided, wanted)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_other_storage_is_the_same_bytes(bnb, storage: torch.dtype):
    w = row_scaled(6, 80)
    plain, _ = bnb.functional.quantize_4bit(w, quant_type="nf4")
    other, state = bnb.functional.quantize_4bit(w, quant_type="nf4", quant_storage=storage)
    assert other.dtype == storage and torch.equal(other.view(torch.uint8).view(-1), plain.view(-1))
    assert torch.equal(bnb.functional.dequantize_4bit(other, state), bnb.functional.dequantize_4bit(plain, state))


def test_zeros_stay_zero_to_the_last_block(bnb):
    """bitsandbytes stores 1e-38 for a ragged last block of zeros."""
    for quant_type, code in (("nf4", 0x77), ("fp4", 0x00)):
        packed, state = bnb.functional.quantize_4bit(torch.zeros(5, 33), quant_type=quant_type)
        assert (packed == code).all() and not state.absmax.any()
        assert torch.equal(bnb.functional.dequantize_4bit(packed, state), torch.zeros(5, 33))


def test_nan_and_inf_stay_in_their_block(bnb):
    w = torch.randn(4, 64)
    w[1, 3], w[2, 5] = float("nan"), float("inf")
    packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4")
    back = bnb.functional.dequantize_4bit(packed, state)
    assert state.absmax[1].isnan() and state.absmax[2].isinf()
    assert back[1].isnan().all() and not back[2].isfinite().any() and back[[0, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_gemm_and_gemv(bnb, quant_type: str, nested: bool, dtype: torch.dtype):
    w, bias = row_scaled(24, 80), torch.randn(24).to(dtype)
    packed, state = bnb.functional.quantize_4bit(w, quant_type=quant_type, compress_statistics=nested)
    stored = bnb.functional.dequantize_4bit(packed, state).double()
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    for m in (1, 3, 40):
        x = torch.randn(m, 80).to(dtype)
        truth = x.double() @ stored.T
        y, out = bnb.functional.gemv_4bit(x, packed, state=state), torch.empty(m, 24, dtype=dtype)
        assert y.dtype == dtype and (y.double() - truth).norm() <= tolerance * truth.norm()
        assert torch.equal(bnb.functional.gemv_4bit(x, packed, out=out, state=state), y)
        if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
            parts = [state.absmax] if not nested else [state.state2.absmax]
            inner = [state.absmax, state.state2.code, state.offset] if nested else []
            y = torch.ops.bitsandbytes.gemm_4bit(x, packed, w.shape, *parts, 64, quant_type, bias, *inner)
            assert y.dtype == dtype and (y.double() - truth - bias.double()).norm() <= tolerance * truth.norm()


def test_gemv_of_an_unknown_code(bnb):
    packed, absmax = torch.zeros(32, 1, dtype=torch.uint8), torch.ones(1)
    with pytest.raises(ValueError, match="code: expected the 16 values of nf4 or fp4"):
        torch.ops.bitsandbytes.gemv_4bit(torch.ones(1, 64), packed, (1, 64), absmax, torch.linspace(-1, 1, 16), 64)
    y = torch.ops.bitsandbytes.gemv_4bit(torch.ones(1, 64), packed, (1, 64), absmax, values4("nf4", packed.device), 64)
    assert y == -64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [64, 256, 4096])
def test_blockwise(bnb, block_size: int, dtype: torch.dtype):
    """With the dynamic code: the reference's, to the nearest exactly."""
    x = row_scaled(9, 500, dtype=torch.float32).clamp(-6e4, 6e4).to(dtype)
    with peftk.use("reference"):
        codes, absmax = peftk.ops.blockwise8_quantize(x, block_size)
        wanted = peftk.ops.blockwise8_dequantize(codes, absmax, block_size, dtype)
    got, state = bnb.functional.quantize_blockwise(x, blocksize=block_size)
    assert torch.equal(got, codes) and torch.equal(state.absmax, absmax)
    assert torch.equal(bnb.functional.dequantize_blockwise(got, state), wanted)
    out = torch.empty_like(x)
    assert torch.equal(bnb.functional.dequantize_blockwise(got, state, out=out), wanted) and torch.equal(out, wanted)


@pytest.mark.parametrize("name", ["unsigned", "linear", "shuffled"])
def test_blockwise_with_another_code(bnb, name: str):
    code = {"unsigned": values8(False), "linear": torch.linspace(-1, 1, 256), "shuffled": torch.rand(256) * 2 - 1}[name]
    x = torch.randn(3, 333)
    x = x.abs() if name == "unsigned" else x
    x.view(-1)[256:512] = 0
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(x, code, 256)
    assert torch.equal(absmax, torch.nn.functional.pad(x.view(-1), (0, 25)).view(4, 256).abs().amax(1))
    back = torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, code, 256, torch.float32).view(-1)
    scale = absmax.repeat_interleave(256)[: x.numel()]
    nearest = (x.view(-1, 1) - scale[:, None] * code).abs().amin(1)
    assert torch.allclose((back - x.view(-1)).abs(), nearest, atol=1e-6)


# ---- optimizers --------------------------------------------------------------------------------------------------------------


def trained(make, dtype: torch.dtype, steps: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((70, 130), (33,))]
    optimizer = make(params)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    return [p.detach() for p in params]


SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.97), "eps": 1e-6, "weight_decay": 0.1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
def test_adamw_is_ours_bit_for_bit(bnb, bits: int, dtype: torch.dtype):
    require_cpu_optimizers(bnb)
    theirs = bnb.optim.AdamW if bits == 32 else bnb.optim.AdamW8bit
    got = trained(lambda params: theirs(params, **SETTINGS), dtype)
    wanted = trained(lambda params: peftk.optim.AdamW(params, **SETTINGS, bits=bits), dtype)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_the_step_runs_on_our_kernel(bnb, monkeypatch: pytest.MonkeyPatch):
    require_cpu_optimizers(bnb)
    from peftk.integrations.bitsandbytes import optimizers

    called = []
    for name in ("adamw_step", "adamw_step8"):
        run = getattr(optimizers, name)
        monkeypatch.setattr(optimizers, name, lambda *a, name=name, run=run, **k: (called.append(name), run(*a, **k)))
    trained(lambda params: bnb.optim.AdamW8bit(params, **SETTINGS), torch.float32, steps=1)
    assert called == ["adamw_step8", "adamw_step"]  # 33 elements stay in 32 bits


@pytest.mark.parametrize("name", ["Lion", "Lion8bit", "SGD", "RMSprop8bit", "Adagrad", "LAMB", "AdEMAMix8bit"])
def test_other_optimizers_stay_bitsandbytes(bnb, name: str):
    """The same result as without us, which needs their functions called with every argument in its place."""
    from peftk.integrations import bitsandbytes as backend

    require_cpu_optimizers(bnb)
    settings = {"lr": 1e-2, "weight_decay": 0.1} | ({"momentum": 0.9} if name == "SGD" else {})
    got = trained(lambda params: getattr(bnb.optim, name)(params, **settings), torch.float32)
    backend.disable()
    wanted = trained(lambda params: getattr(bnb.optim, name)(params, **settings), torch.float32)
    backend.enable()
    tolerance = 1e-2 if name.endswith("8bit") else 0  # their states take our codes, to the nearest exactly
    assert all(torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in zip(got, wanted, strict=True))


def test_adam_with_settings_that_ours_lacks(bnb):
    require_cpu_optimizers(bnb)
    p, g = torch.ones(8), torch.full((8,), 100.0)
    states = torch.zeros(8), torch.zeros(8)
    unorm = torch.zeros(1)
    bnb.functional.optimizer_update_32bit(
        "adam", g, p, states[0], 0.9, 1e-8, 1, 1e-2, states[1], 0.99, unorm_vec=unorm, max_unorm=0.01
    )
    assert unorm.item() > 0 and (1 - p).max() < 1e-3  # the update's norm was held to a hundredth of p's


def require_cpu_optimizers(bnb) -> None:
    if not hasattr(bnb.backends.cpu.ops, "_optimizer_update_32bit_cpu"):
        pytest.skip("bitsandbytes has no optimizers on a CPU before 0.50")
