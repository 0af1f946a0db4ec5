"""The layers that HF peft's become: hooks, copies, compiling, starts taken from the weight; and how they come to be."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from hf_pairs import adalora, bytes_of, counted, decoded, each_layer, hf, in_4_bits, lora, pair, randomise, wrapped
from tiny_models import run, weight_grads
from torch import nn

import peftk
from peftk.integrations import peft as integration

VERSION = tuple(map(int, hf.__version__.split(".")[:2]))
CONFIGS = {"lora": lora, "dora": lambda: lora(use_dora=True), "adalora": adalora}


def note(seen: list[torch.Tensor], module: nn.Module, x: tuple, y: torch.Tensor) -> None:
    seen.append(y)


def test_hooks_on_any_part_are_called():
    ours, _ = pair("llama", lora(lora_dropout=0.1))
    layer = each_layer(ours)[0]
    for part in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"], layer.lora_dropout["default"]):
        seen: list[torch.Tensor] = []
        handle = part.register_forward_hook(partial(note, seen))
        layer(torch.ones(1, 32))
        handle.remove()
        assert len(seen) == 1
    layer.lora_A["default"].forward = lambda x: torch.zeros(*x.shape[:-1], 4)  # as accelerate puts its own there
    assert torch.equal(layer.eval()(torch.ones(1, 32)), layer.base_layer(torch.ones(1, 32)))


@pytest.mark.parametrize("config", ["lora", "dora", "adalora"])
def test_copies_and_pickles(config: str):
    ours, _ = pair("llama", CONFIGS[config]())
    expected = run(ours, "llama")
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(run(twin, "llama"), expected)
        assert all(type(a) is type(b) for a, b in zip(each_layer(twin), each_layer(ours), strict=True))
        with torch.no_grad():
            for layer in each_layer(twin):
                for factor in layer.lora_B.parameters():
                    factor.zero_()
        assert not torch.equal(run(twin, "llama"), expected) and torch.equal(run(ours, "llama"), expected)


@pytest.mark.parametrize("config", ["lora", *(pytest.param(c, marks=pytest.mark.full) for c in ("dora", "adalora"))])
def test_compiles_as_one_graph(config: str):
    ours, _ = pair("llama", CONFIGS[config]())
    layer, x = each_layer(ours)[0], torch.randn(3, 32)
    expected = layer(x)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.skipif(VERSION < (0, 20), reason="transformers asks for HF peft 0.20")
def test_transformers_own_add_adapter():
    base = in_4_bits("llama")
    base.add_adapter(lora(), adapter_name="mine")
    assert len(each_layer(base)) == 14 and all(type(layer).__name__ == "FusedLinear" for layer in each_layer(base))


def test_preparing_for_training_in_few_bits_leaves_the_bytes():
    base = in_4_bits("llama", torch.bfloat16)
    before = bytes_of(base)
    hf.prepare_model_for_kbit_training(base)
    assert all(torch.equal(a, b) for a, b in zip(bytes_of(base), before, strict=True))
    weight_grads(randomise(wrapped(base, lora(task_type="CAUSAL_LM"))), "llama")


@pytest.mark.parametrize("start", ["loftq", "corda", "lora_ga"])
def test_a_start_that_comes_too_late_says_what_to_do(start: str):
    config = lora(task_type="CAUSAL_LM")
    config.init_lora_weights = start  # HF peft's own check of it asks for more packages
    with pytest.raises(ValueError, match=f"init_lora_weights: '{start}' .* is in 4 bits already: prepare it before"):
        wrapped(in_4_bits("llama"), config)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "mica"])
def test_starts_are_hf_pefts_on_the_decoded_weight(start: str):
    """Those that leave a rest have it quantised once."""
    if start == "mica" and VERSION < (0, 20):
        pytest.skip("newer than this HF peft")
    base = in_4_bits("llama")
    twin = decoded(base)
    models, names = [], ["q_proj", "down_proj"]
    for model in (base, twin):
        torch.manual_seed(1)
        models.append(wrapped(model, lora(init_lora_weights=start, task_type="CAUSAL_LM", target_modules=names)))
    ours, theirs = models
    wanted = {n: p for n, p in theirs.named_parameters() if "lora_" in n}
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(parameter, wanted[name], rtol=1e-3, atol=1e-4, msg=name)
    for name, module in theirs.named_modules():
        if name.endswith("base_layer"):
            rest, got = module.weight.detach(), ours.get_submodule(name).dense_weight()
            leaves_rest = start.startswith(("pissa", "olora"))
            expected = peftk.quantize_nf4(rest).dequantize() if leaves_rest else rest
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-2 * rest.abs().max().item(), msg=name)


def test_eva_is_fitted_from_inputs():
    seen = []
    for model in (base := in_4_bits("llama"), decoded(base)):
        torch.manual_seed(1)
        model = wrapped(model, lora(init_lora_weights="eva", task_type="CAUSAL_LM", target_modules=["q_proj"]))
        data = [{"input_ids": torch.randint(1, 61, (8, 9), generator=torch.Generator().manual_seed(i))} for i in range(4)]
        hf.initialize_lora_eva_weights(model, data, show_progress_bar=False)
        seen.append([p for n, p in model.named_parameters() if "lora_A" in n])
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close((ours @ theirs.T).abs(), torch.eye(len(ours)), rtol=0, atol=0.05)


# ---- registration -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def unregistered():
    integration.unregister()
    yield
    integration.register()


def test_layers_from_before_the_registration_are_fused_by_one_line(unregistered, monkeypatch: pytest.MonkeyPatch):
    base = in_4_bits("llama")
    ours = randomise(wrapped(base, lora(task_type="CAUSAL_LM")))
    assert {type(layer).__module__ for layer in each_layer(ours)} == {"peft.tuners.lora.layer"}
    with counted(monkeypatch) as calls:
        stock = run(ours, "llama")
        assert calls[0] == 0
        assert integration.fuse(ours) is ours
        torch.testing.assert_close(run(ours, "llama"), stock, rtol=1e-4, atol=1e-4)
        assert calls[0] == len(each_layer(ours))
    integration.fuse(ours).merge_adapter()
    with pytest.raises(ValueError, match="model: expected 4-bit layers inside HF peft's, got a Linear"):
        integration.fuse(nn.Linear(2, 2))


def test_registration_is_done_once_and_can_be_switched_off(unregistered, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PEFTK_PEFT", "0")
    integration.register()
    assert not integration._handles
    monkeypatch.delenv("PEFTK_PEFT")
    integration.register()
    integration.register()
    assert len(integration._handles) == 1


@pytest.mark.parametrize("version", ["0.17.1", "0.22.0", "1.0.0.dev0"])
def test_an_unknown_version_is_left_alone_with_one_warning(version: str, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(hf, "__version__", version)
    integration._is_unknown_version.cache_clear()
    try:
        ours = wrapped(in_4_bits("llama"), lora(task_type="CAUSAL_LM"))
        assert {type(layer).__module__ for layer in each_layer(ours)} == {"peft.tuners.lora.layer"}
        assert [r.message for r in caplog.records if "peft: expected 0.18 to 0.21, got " + version in r.message] != []
        assert len(caplog.records) == 1
        with pytest.raises(RuntimeError, match=f"peft: expected 0.18 to 0.21, got {version}"):
            integration.fuse(ours)
    finally:
        integration._is_unknown_version.cache_clear()


def test_nothing_of_hf_peft_is_replaced():
    from peft.tuners.lora import Linear

    dense = wrapped(nn.Sequential(nn.Linear(8, 8)), hf.LoraConfig(target_modules=["0"]))
    assert type(dense.base_model.model[0]) is Linear and Linear.forward.__module__ == "peft.tuners.lora.layer"


def test_own_adapters_are_not_taken_for_hf_pefts():
    model = peftk.attach(in_4_bits("llama"), peftk.LoraConfig(r=2))
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "LoraLinear"
