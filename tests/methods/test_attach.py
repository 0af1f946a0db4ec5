"""Attach, switch, disable, merge, detach: the same for every method, here with LoRA."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny_models as tiny
import torch
from tiny_models import net, out, trained
from torch import nn

import peftk
from peftk import LoraConfig, attach, detach, disable_adapters, merge, set_adapter


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_disabled_and_detached_are_the_original(base, bias):
    model = net(base)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    classes, y = [type(m) for m in model.modules()], out(model.requires_grad_(False))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    trained(attach(model, LoraConfig(target_modules=["q"], bias=bias)))
    assert not torch.allclose(out(model), y, atol=1e-3)
    with disable_adapters(model):
        assert torch.equal(out(model), y)
        with disable_adapters(model):
            assert torch.equal(out(model), y)
        assert torch.equal(out(model), y)
    assert not torch.allclose(out(model), y, atol=1e-3)
    with pytest.raises(KeyError), disable_adapters(model):
        raise KeyError
    assert not torch.allclose(out(model), y, atol=1e-3)
    detach(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(out(model.requires_grad_(False)), y)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_adapters_add_up_and_switch(base):
    model = net(base)
    y = out(model.requires_grad_(False))
    trained(attach(model, LoraConfig(r=4, target_modules=["head"]), "a"))
    ya = out(model)
    trained(attach(model, LoraConfig(r=2, target_modules=["head"]), "b"))
    yb = out(model)
    set_adapter(model, ["a", "b"])
    torch.testing.assert_close(out(model) - y, (ya - y) + (yb - y), rtol=1e-4, atol=1e-4)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in names} == {"a", "b"}
    set_adapter(model, "a")
    assert torch.equal(out(model), ya)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"a"}
    with pytest.raises(ValueError, match="no adapter called 'c'; attached are a, b"):
        set_adapter(model, ["a", "c"])
    assert torch.equal(out(model), ya)
    peftk.delete_adapter(model, "a")
    set_adapter(model, "b")
    assert torch.equal(out(model), yb)
    peftk.delete_adapter(model, "b")
    assert torch.equal(out(model), y)
    with pytest.raises(ValueError, match="expected one with adapters"):
        set_adapter(model, "b")


def test_trained_biases_belong_to_their_adapter():
    model = net()
    y = out(model.requires_grad_(False))
    trained(attach(model, LoraConfig(target_modules=["q"], bias="all"), "a"))
    ya = out(model)
    attach(model, LoraConfig(target_modules=["q"]), "b")
    torch.testing.assert_close(out(model), y, rtol=0, atol=1e-6)
    set_adapter(model, "a")
    assert torch.equal(out(model), ya)


def test_the_fast_path_of_torchs_encoder_sees_adapters():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    trained(attach(layer, LoraConfig(target_modules=["linear1", "linear2"])))
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        fast = layer(x)
    torch.testing.assert_close(fast, layer(x).detach(), rtol=1e-5, atol=1e-5)


def test_hooks_from_before_still_fire():
    model, calls = net(), []
    model.layers[0]["q"].register_forward_hook(lambda *_: calls.append(1))
    attach(model, LoraConfig(target_modules=["q"]))
    out(model)
    assert len(calls) == 1


def test_a_module_that_stands_in_two_places_is_wrapped_in_both():
    linear = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": linear, "b": linear})
    attach(model, LoraConfig(target_modules=["a"]))
    assert model["a"] is model["b"] is not linear
    detach(model)
    assert model["a"] is model["b"] is linear


def test_copies_and_pickles_are_independent():
    model = trained(attach(net("nf4"), LoraConfig(target_modules=["q"])))
    y = out(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(out(twin), y)
        trained(twin)
        assert torch.equal(out(model), y) and not torch.equal(out(twin), y)
        set_adapter(twin, "default")


def test_what_fails_leaves_the_model_as_before():
    model = net()
    before, classes = tiny.state_of(model), [type(m) for m in model.modules()]
    bad = [
        (LoraConfig(target_modules=["nothing"]), "target_modules: .*match"),
        (LoraConfig(target_modules=["q", "norm"]), "target_modules: .*norm"),
        (LoraConfig(target_modules=["q"], modules_to_save=["nothing"]), "modules_to_save: .*nothing"),
    ]
    for config, message in bad:
        with pytest.raises(ValueError, match=message):
            attach(model, config)
        assert [type(m) for m in model.modules()] == classes
        tiny.assert_same_state(before, tiny.state_of(model))
    for name in ("", "a.b", 3, "training", "_parameters", "keys"):
        with pytest.raises(ValueError, match="adapter_name: expected"):
            attach(model, LoraConfig(target_modules=["q"]), name)
    with pytest.raises(TypeError, match="model: expected an nn.Module, got int"):
        attach(3, LoraConfig())
    with pytest.raises(TypeError, match="config: expected a method's config, LoraConfig for one, got dict"):
        attach(model, {"r": 8})
    attach(model, LoraConfig(target_modules=["q"]))
    with pytest.raises(ValueError, match="adapter_name: 'default' is attached already"):
        peftk.qlora(model, gradient_checkpointing=False)
    assert not any(isinstance(m, peftk.nn.NF4Linear) for m in model.modules())
    with pytest.raises(ValueError, match="adapter_name: 'default' is attached already"):
        attach(model, LoraConfig(target_modules=["q"]))
    with pytest.raises(ValueError, match="no adapter called 'c'"):
        merge(model, "c")


def test_inference_mode_and_a_config_of_its_own():
    model, config = net(), LoraConfig(target_modules=["q"], inference_mode=True)
    attach(model, config)
    assert not peftk.trainable_parameters(model)
    config.r = 99
    assert model.layers[0]["q"].lora_A["default"].shape[0] == 8
