"""HF peft's layers around bitsandbytes' Linear4bit take the fused op where peftk has taken bitsandbytes over: equal results."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hf_pairs import hf, randomise, wrapped
from torch import nn

from peftk.integrations import bitsandbytes as backend
from peftk.integrations import peft as integration
from peftk.integrations.peft import on_bitsandbytes

bnb = pytest.importorskip("bitsandbytes")


@pytest.fixture
def taken_over(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With fused layers also on a machine whose dense product is faster."""
    monkeypatch.setattr(on_bitsandbytes, "_dense_dtypes", frozenset)
    backend.enable()
    yield
    backend.disable()


def model(compute_dtype: torch.dtype | None) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential()
    for name, (k, n, bias) in {"a": (64, 96, True), "b": (96, 32, False)}.items():
        layer = bnb.nn.Linear4bit(k, n, bias, compute_dtype=compute_dtype, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(torch.randn(n, k), requires_grad=False, quant_type="nf4").to("cpu")
        made.add_module(name, layer)
    made.is_loaded_in_4bit = True
    return made


CONFIGS = {
    "lora": lambda: hf.LoraConfig(r=4, target_modules=["a", "b"]),
    "adalora": lambda: hf.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["a", "b"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS)
def test_fused_equals_hf_pefts_own(config: str, dtype: torch.dtype, taken_over, monkeypatch: pytest.MonkeyPatch):
    base, calls = model(dtype), []
    op = on_bitsandbytes.nf4_lora_linear
    monkeypatch.setattr(on_bitsandbytes, "nf4_lora_linear", lambda *a, **k: calls.append(1) or op(*a, **k))
    integration.unregister()
    try:
        stock = randomise(wrapped(copy.deepcopy(base), CONFIGS[config]()))
    finally:
        integration.register()
    fused = wrapped(base, CONFIGS[config]())
    fused.load_state_dict(stock.state_dict(), strict=False)
    x, seen = torch.randn(5, 64), []
    for candidate in (stock, fused):
        z = x.clone().requires_grad_()
        y = candidate.base_model.model(z)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        seen.append((y.detach(), z.grad, *(p.grad for n, p in candidate.named_parameters() if "lora_" in n)))
    assert len(calls) == 2
    bound = 1e-4 if dtype == torch.float32 else 3e-2
    for got, expected in zip(*seen[::-1], strict=True):
        assert (got - expected).norm() <= bound * expected.norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_batch_is_one_op(dtype: torch.dtype, taken_over, monkeypatch: pytest.MonkeyPatch):
    base, calls = model(dtype), []
    op = on_bitsandbytes.nf4_lora_linear_rows
    monkeypatch.setattr(on_bitsandbytes, "nf4_lora_linear_rows", lambda *a: calls.append(1) or op(*a))
    integration.unregister()
    try:
        stock = with_two_adapters(copy.deepcopy(base))
    finally:
        integration.register()
    fused = with_two_adapters(base)
    fused.load_state_dict(stock.state_dict(), strict=False)
    x, names = torch.randn(4, 3, 64), ["other", "__base__", "default", "other"]
    with torch.no_grad():
        expected, y = (candidate.base_model.model.a(x, adapter_names=names) for candidate in (stock, fused))
    assert len(calls) == 1 and y.dtype == expected.dtype
    assert (y - expected).norm() <= (1e-4 if dtype == torch.float32 else 3e-2) * expected.norm()


def with_two_adapters(base: nn.Module) -> nn.Module:
    made = wrapped(base, CONFIGS["lora"]())
    made.add_adapter("other", hf.LoraConfig(r=2, target_modules=["a", "b"]))
    return randomise(made).eval()


def test_merging_is_hf_pefts_own_and_the_fused_op_reads_the_new_bytes(taken_over):
    fused = randomise(wrapped(model(torch.float32), CONFIGS["lora"]()))
    layer, x = fused.base_model.model.a, torch.randn(3, 64)
    y = layer(x)
    with pytest.warns(UserWarning, match="rounding"):
        fused.merge_adapter()
    merged = layer(x)
    with pytest.warns(UserWarning, match="rounding"):
        fused.unmerge_adapter()
    assert (merged - y).norm() < 0.3 * y.norm() and (layer(x) - y).norm() < 0.4 * y.norm() and not torch.equal(layer(x), y)


def test_bitsandbytes_alone_is_left_alone():
    backend.disable()
    left = wrapped(model(torch.float32), CONFIGS["lora"]())
    assert type(left.base_model.model.a).__module__ == "peft.tuners.lora.bnb"
    with pytest.raises(ValueError, match="expected 4-bit layers"):
        integration.fuse(left)
