"""Merging HF peft's adapters into 4-bit weights: what the decoded model's merged weights are, quantised once; undone exactly."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hf_pairs import adalora, add, bytes_of, each_layer, hf, in_4_bits, lora, pair, randomise, wrapped
from tiny_models import run
from torch import nn

import peftk
from peftk.nn import NF4Linear

CONFIGS = {
    "lora": lora,
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "lora_bias": lambda: lora(lora_bias=True, target_modules=["q_proj", "v_proj"]),
    "adalora": adalora,
    "ia3": lambda: hf.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": lambda: hf.OFTConfig(oft_block_size=4, target_modules=["q_proj", "down_proj"]),
}


def same_bytes(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_quantised(ours: nn.Module, theirs: nn.Module) -> None:
    """Each of our weights is HF peft's merged one, quantised; a value at a threshold may fall on its other side."""
    dense = dict(theirs.named_modules())
    for path, module in ours.named_modules():
        if path.endswith(".base_layer"):
            expected = peftk.quantize_nf4(dense[path].weight.detach().float()).dequantize()
            differing = ~torch.isclose(module.dense_weight(), expected, rtol=1e-3, atol=1e-6)
            assert differing.float().mean() < 0.01, path
            if module.bias is not None:
                torch.testing.assert_close(module.bias, dense[path].bias)


@pytest.mark.parametrize("config", CONFIGS)
def test_merged_weights_are_hf_pefts_quantised_once_and_come_back_exactly(config: str):
    ours, theirs = pair("llama", CONFIGS[config]())
    y, before = run(ours, "llama"), bytes_of(ours)
    torch.testing.assert_close(y, run(theirs, "llama"), rtol=1e-3, atol=1e-3)
    for model in (ours, theirs):
        model.merge_adapter()
    assert_quantised(ours, theirs)
    near = run(ours, "llama")
    assert 0 < (near - y).norm() < 0.5 * y.norm() and not same_bytes(bytes_of(ours), before)
    ours.unmerge_adapter()
    assert same_bytes(bytes_of(ours), before) and torch.equal(run(ours, "llama"), y)


@pytest.mark.parametrize("second", ["lora", "dora"])
@pytest.mark.parametrize("at_once", [True, False])
def test_several_are_summed_before_the_one_rounding(second: str, at_once: bool):
    ours, theirs = models = pair("llama", lora())
    add(models, CONFIGS[second](), "second")
    before, names = bytes_of(ours), ["default", "second"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in models:
            for part in [names] if at_once else [names[:1], names[1:]]:
                model.base_model.merge_adapter(part, safe_merge=at_once)
    assert_quantised(ours, theirs)
    assert each_layer(ours)[0].merged_adapters == names
    ours.unmerge_adapter()
    assert same_bytes(bytes_of(ours), before)


def test_the_bytes_are_those_of_peftk_merge(tmp_path):
    ours, _ = pair("llama", lora())
    ours.save_pretrained(tmp_path)
    own = in_4_bits("llama")
    peftk.load_adapter(own, tmp_path)
    assert same_bytes(bytes_of(peftk.merge(own)), bytes_of(ours.merge_and_unload()))


@pytest.mark.parametrize("config", ["lora", "dora", "adalora"])
def test_merge_and_unload_leaves_the_quantised_model(config: str):
    ours, _ = pair("llama", CONFIGS[config]())
    ours.merge_adapter()
    merged, stored = run(ours, "llama"), bytes_of(ours)
    ours.unmerge_adapter()
    model = ours.merge_and_unload(safe_merge=True)
    assert type(model).__name__ == "LlamaForCausalLM" and same_bytes(bytes_of(model), stored)
    assert torch.equal(run(model, "llama"), merged) and not any("lora" in name for name, _ in model.named_parameters())
    assert len(each_layer(wrapped(model, lora(task_type="CAUSAL_LM")))) == 14


def test_unload_and_disabling_give_the_base_back():
    ours, _ = pair("llama", lora())
    before = bytes_of(ours)
    base = run(in_4_bits("llama"), "llama")
    ours.merge_adapter()
    with ours.disable_adapter():
        assert torch.equal(run(ours, "llama"), base)
    assert same_bytes(bytes_of(ours), before)
    assert torch.equal(run(ours.unload(), "llama"), base)


@pytest.mark.parametrize("safe", [True, False])
def test_an_adapter_that_is_not_finite_is_refused_and_changes_nothing(safe: bool):
    ours, _ = pair("llama", lora())
    layer = each_layer(ours)[0]
    layer.lora_A["default"].weight.data[0, 0] = float("nan")
    before = bytes_of(layer)
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=safe)
    assert same_bytes(bytes_of(layer), before) and not layer.merged and layer.original is None
    assert isinstance(layer.base_layer, NF4Linear)


def test_a_bias_without_a_place_is_refused_and_changes_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, _ = pair("llama", lora(lora_bias=True, target_modules=["down_proj"]))
    before = bytes_of(ours)
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        ours.merge_adapter()
    assert same_bytes(bytes_of(ours), before) and not any(layer.merged for layer in each_layer(ours))


def test_nothing_to_merge_changes_nothing():
    ours, _ = pair("llama", lora())
    layer = each_layer(ours)[0]
    before = bytes_of(layer)
    layer.merge(adapter_names=["another"])
    assert same_bytes(bytes_of(layer), before) and not layer.merged and layer.original is None
    layer.merge()
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge()
    with pytest.raises((TypeError, ValueError), match="list of strings"):
        layer.merge(adapter_names="default")


def test_a_merged_copy_moved_and_cast_comes_back_exactly():
    ours, _ = pair("llama", lora())
    before = bytes_of(ours)
    ours.merge_adapter()
    twin = copy.deepcopy(ours).bfloat16()
    ours.unmerge_adapter()
    assert not same_bytes(bytes_of(twin), before)
    twin.unmerge_adapter()
    assert same_bytes(bytes_of(twin), before)


@pytest.mark.parametrize(("n", "k", "facts"), [(7, 33, {}), (5, 48, {"double_quant": False, "block_size": 32})])
def test_ragged_shapes_and_other_blocks(n: int, k: int, facts: dict):
    layer = NF4Linear(k, n, **facts)
    w = layer.dense_weight()
    ours = randomise(wrapped(nn.Sequential(layer), lora(target_modules=["0"], r=2)))
    wrapper, x = ours.base_model.model[0], torch.randn(3, k)
    y, before = ours(x), bytes_of(ours)
    torch.testing.assert_close(y, nn.functional.linear(x, w + wrapper.get_delta_weight("default"), layer.bias))
    ours.merge_adapter()
    expected = peftk.quantize_nf4(w + wrapper.get_delta_weight("default"), layer.block_size, facts.get("double_quant", True))
    assert torch.equal(layer.dense_weight(), expected.dequantize()) and layer.block_size == facts.get("block_size", 64)
    ours.unmerge_adapter()
    assert same_bytes(bytes_of(ours), before)
