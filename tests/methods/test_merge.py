"""Merging: one rounding, exact undoing, a report before, and nothing half done."""

from __future__ import annotations

import copy
import logging

import pytest
import tiny_models as tiny
import torch
from tiny_models import net, out, trained
from torch import nn

import peftk
from peftk import LoraConfig, attach, detach, disable_adapters, merge, set_adapter, unmerge
from peftk.methods.lora_linear import LoraLinear


@pytest.mark.parametrize("base", ["dense", "nf4", "bf16"])
def test_merge_and_exact_unmerge(base):
    model = net(base).bfloat16() if base == "bf16" else net(base)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    y0 = out(model.requires_grad_(False))
    trained(attach(model, LoraConfig(r=4, target_modules=["q", "head", "embed"]), "a"))
    trained(attach(model, LoraConfig(r=2, target_modules=["q"]), "b"))
    set_adapter(model, ["a", "b"])
    y = out(model)
    merge(model)
    error = (out(model) - y).norm() / y.norm()
    assert error < {"dense": 1e-6, "bf16": 0.02, "nf4": 0.5}[base]
    with disable_adapters(model):
        assert torch.equal(out(model), y0)
    unmerge(model)
    assert torch.equal(out(model), y)
    detach(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], t) for name, t in before.items())


def test_several_adapters_are_rounded_once():
    model = net().bfloat16()
    trained(attach(model, LoraConfig(target_modules=["q"]), "a"))
    trained(attach(model, LoraConfig(target_modules=["q"]), "b"))
    together = merge(copy.deepcopy(model), ["a", "b"])
    layer = model.layers[0]["q"]
    deltas = sum(layer.scaling[n] * (layer.lora_B[n] @ layer.lora_A[n]) for n in "ab")
    exact = (layer.base_layer.weight.float() + deltas).bfloat16()
    assert torch.equal(together.layers[0]["q"].weight, exact)
    merge(merge(model, "a"), "b")
    assert torch.equal(model.layers[0]["q"].weight, exact)


def test_safe_merge_changes_nothing():
    model = net("nf4")
    trained(attach(model, LoraConfig(target_modules=["q", "head"])))
    with torch.no_grad():
        model.head.lora_B["default"][3, 1] = float("inf")
    before = tiny.state_of(model)
    with pytest.raises(ValueError, match="head: expected finite .*nothing was merged"):
        merge(model)
    tiny.assert_same_state(before, tiny.state_of(model))


def test_merge_without_the_original_bytes_cannot_be_undone():
    model = trained(attach(net(), LoraConfig(target_modules=["q"])))
    y = out(merge(model, keep_original=False))
    with pytest.raises(RuntimeError, match="keep_original=True"):
        unmerge(model)
    detach(model)
    torch.testing.assert_close(out(model), y)


def test_merging_a_tied_weight_warns_and_leaves_the_other_module(caplog):
    model = tiny.gpt2().eval()
    trained(attach(model, LoraConfig(target_modules=["wte"])))
    with torch.no_grad():
        y = tiny.run(model, "gpt2")
        with caplog.at_level(logging.WARNING, "peftk"):
            merge(model)
        assert "tied" in caplog.text or "shared" in caplog.text
        torch.testing.assert_close(tiny.run(model, "gpt2"), y, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert model.lm_head.weight is model.transformer.wte.weight


def two_adapters(base: str = "nf4") -> nn.Module:
    model = net(base)
    for name, r in (("a", 4), ("b", 2)):
        trained(attach(model, LoraConfig(r=r, target_modules=["q", "head", "embed"]), name))
    set_adapter(model, ["a", "b"])
    return model


def test_adapters_in_sixteen_bits_are_summed_in_fp32():
    """As after model.to(bfloat16): the factors are rounded then, their products and sums aren't."""
    model = two_adapters("dense").bfloat16()
    layers = {path: model.get_submodule(path) for path in ("layers.0.q", "embed")}
    expected = {}
    for path, layer in layers.items():
        w = layer.read_weight().float()
        for name in ("a", "b"):
            A, B = (p.detach().float() for p in layer.adapter_parameters(name))
            w = w + layer.scaling[name] * (A.T @ B.T if path == "embed" else B @ A)
        expected[path] = w
    merge(model)
    for path, layer in layers.items():
        assert torch.equal(layer.read_weight(), expected[path].bfloat16())


def test_a_broken_adapter_is_named():
    model = two_adapters()
    with torch.no_grad():
        model.layers[1]["q"].lora_A["b"][1, 3] = float("inf")
    before = tiny.state_of(model)
    for run in (merge, lambda m: merge(m, dry_run=True)):
        with pytest.raises(ValueError, match=r"^layers\.1\.q: expected finite .* with b; nothing was merged$"):
            run(model)
        tiny.assert_same_state(before, tiny.state_of(model))
    merge(model, "a")


def test_a_sum_beyond_fp16_names_both():
    model = net().half()
    for name in ("a", "b"):
        attach(model, LoraConfig(r=1, lora_alpha=1, target_modules=["head"]), name)
        with torch.no_grad():
            model.head.lora_A[name].fill_(200.0)
            model.head.lora_B[name].fill_(200.0)
    with pytest.raises(ValueError, match="head: expected finite merged weights, got NaN or Inf with a, b"):
        merge(model, ["a", "b"])
    merge(model, "a")


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_merge_that_fails_on_the_way_leaves_nothing_half_merged(base, monkeypatch):
    model = two_adapters(base)
    y, before, calls = out(model), tiny.state_of(model), []

    def fail_at_the_second(layer, w):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room")
        layer.base_layer.set_dense_weight(w)

    monkeypatch.setattr(LoraLinear, "write_weight", fail_at_the_second)
    with pytest.raises(MemoryError, match="no room"):
        merge(model)
    tiny.assert_same_state(before, tiny.state_of(model))
    assert torch.equal(out(model), y)
    calls.clear()
    with pytest.raises(RuntimeError, match=r"layers\.1\.q: the merge failed here, .*keep_original=False\): no room"):
        merge(model, keep_original=False)


@pytest.mark.parametrize("base", ["dense", "nf4", "bf16"])
def test_the_report_tells_what_the_merge_does(base):
    model = net(base).bfloat16() if base == "bf16" else net(base)
    for name, r in (("a", 4), ("b", 2)):
        trained(attach(model, LoraConfig(r=r, target_modules=["q", "head", "embed"]), name))
    set_adapter(model, ["a", "b"])
    before = tiny.state_of(model)
    report = merge(model, dry_run=True)
    tiny.assert_same_state(before, tiny.state_of(model))
    paths = ["layers.0.q", "layers.1.q", "head", "embed"]
    assert sorted(error.path for error in report.weights) == sorted(paths)
    layers = {path: model.get_submodule(path) for path in paths}
    exact = {path: layer.merged_weight(["a", "b"]) for path, layer in layers.items()}
    old = {path: layer.read_weight().float().clone() for path, layer in layers.items()}
    merge(model)
    for path, layer in layers.items():
        off = (layer.read_weight().float() - exact[path]).norm()
        assert report[path].relative == pytest.approx((off / exact[path].norm()).item(), rel=1e-4)
        assert report[path].of_adapters == pytest.approx((off / (exact[path] - old[path]).norm()).item(), rel=1e-4)
        assert report[path].adapters == ("a", "b") and path in str(report)
    assert report.worst == max(error.relative for error in report.weights)
    limits = {"dense": (0, 0), "bf16": (1e-4, 0.01), "nf4": (0.02, 0.15)}[base]
    assert limits[0] <= report["layers.0.q"].relative <= limits[1]
    with pytest.raises(ValueError, match="dry_run: expected a model without merged adapters, got one with a, b"):
        merge(model, dry_run=True)
    with pytest.raises(KeyError, match="no such weight; there are"):
        report["nowhere"]


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_merged_layer_runs_as_the_base_does(base, monkeypatch):
    """The same call with the same arguments, and after detach the very module."""
    model = net(base)
    plain = model.layers[0]["q"]
    trained(attach(model, LoraConfig(target_modules=["q"])))
    layer, calls = model.layers[0]["q"], []
    merge(model)
    for method in ("forward", "forward_low_rank"):
        real = getattr(layer.base_layer, method)
        monkeypatch.setattr(layer.base_layer, method, lambda *a, m=method, r=real, **k: calls.append(m) or r(*a, **k))
    y = out(model)
    assert calls == ["forward"]
    detach(model)
    assert model.layers[0]["q"] is plain and torch.equal(out(model), y)


def test_merged_weights_equal_hf():
    ours, theirs = tiny.twins(tiny.llama(), {"r": 4, "target_modules": ["q_proj", "down_proj"]})
    detach(merge(ours))
    got = ours.state_dict()
    for name, w in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(got[name], w, rtol=1e-6, atol=1e-6)


def test_two_adapters_on_four_bits_are_quantised_once():
    """HF peft quantises after each adapter: further from the sum."""
    model = two_adapters()
    layer = model.layers[0]["q"]
    exact, w = layer.merged_weight(["a", "b"]), layer.read_weight()
    with_a = peftk.quantize_nf4(w + layer.delta_weight("a")).dequantize()
    twice = peftk.quantize_nf4(with_a + layer.delta_weight("b")).dequantize()
    merge(model)
    assert torch.equal(layer.read_weight(), peftk.quantize_nf4(exact).dequantize())
    assert (layer.read_weight() - exact).norm() < 0.9 * (twice - exact).norm()
