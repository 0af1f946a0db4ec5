"""HF peft's own functions on a model in 4 bits, against HF peft on the decoded weights: outputs, gradients, adapters by name."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_pairs import (
    adalora,
    add,
    counted,
    each_layer,
    gradients,
    hf,
    lora,
    pair,
)
from tiny_models import run, weight_grads
from torch import nn

from peftk.nn import nf4_linear

CONFIGS = {
    "lora": lora,
    "rslora": lambda: lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"query": 9}),
    "dora": lambda: lora(use_dora=True),
    "lora_bias": lambda: lora(lora_bias=True),
    "adalora": adalora,
    "eva, not yet fitted": lambda: lora(init_lora_weights="eva"),
    "prefix": lambda: hf.PrefixTuningConfig(num_virtual_tokens=3),
    "prompt": lambda: hf.PromptTuningConfig(num_virtual_tokens=3),
    "p-tuning": lambda: hf.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16),
}
FUSED = ("lora", "rslora", "dora", "adalora", "eva, not yet fitted")


def assert_same_step(ours: nn.Module, theirs: nn.Module, kind: str, rtol: float = 1e-4) -> None:
    """Outputs and gradients."""
    y, expected = weight_grads(ours, kind), weight_grads(theirs, kind)
    torch.testing.assert_close(y, expected, rtol=rtol, atol=rtol)
    got, wanted = gradients(ours), gradients(theirs)
    assert got.keys() == wanted.keys() and got
    for name, gradient in wanted.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=10 * rtol * scale + 1e-7, msg=name)


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("config", CONFIGS)
def test_outputs_and_gradients_are_those_on_the_decoded_model(kind: str, config: str, monkeypatch: pytest.MonkeyPatch):
    if kind == "bert" and config == "lora_bias":
        pytest.skip("BERT's linear layers all have biases, as this Llama's q, k and v have")
    ours, theirs = pair(kind, CONFIGS[config]())
    with counted(monkeypatch) as calls:
        assert_same_step(ours, theirs, kind)
    assert calls[0] == (len(each_layer(ours)) if config in FUSED else 0)


@pytest.mark.parametrize("upcast", [True, False], ids=["adapters in fp32", "adapters in bf16"])
@pytest.mark.parametrize("config", ["lora", "dora", "adalora"])
def test_16_bit_is_as_near_to_the_truth_as_hf_peft(config: str, upcast: bool):
    ours, theirs = pair("llama", CONFIGS[config](), torch.bfloat16, autocast_adapter_dtype=upcast)
    if not upcast:
        for model in (ours, theirs):
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.bfloat16()
    truth = copy.deepcopy(theirs).float()
    y, expected, exact = (run(model, "llama") for model in (ours, theirs, truth))
    assert y.dtype == expected.dtype and (y.float() - exact).norm() <= 2 * (expected.float() - exact).norm()


@pytest.mark.parametrize("config", [lora, lambda: lora(use_dora=True)], ids=["lora", "dora"])
def test_under_autocast(config, monkeypatch: pytest.MonkeyPatch):
    ours, theirs = pair("llama", config())
    with torch.autocast("cpu", torch.bfloat16), counted(monkeypatch) as calls:
        y, expected = run(ours, "llama"), run(theirs, "llama")
    assert calls[0] and y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.1, atol=0.2)


@pytest.mark.parametrize("config", ["lora", "dora", "adalora"])
def test_dropout_falls_on_the_branch_and_is_the_same_with_gradient_checkpointing(config: str):
    made = {"lora": lora, "dora": lambda **f: lora(use_dora=True, **f), "adalora": adalora}[config](lora_dropout=0.4)
    ours, theirs = pair("llama", made)
    quiet = run(ours, "llama")
    ours.train()
    torch.manual_seed(5)
    noisy = weight_grads(ours, "llama")
    first = gradients(ours)
    assert not torch.allclose(noisy, quiet, atol=1e-3)
    ours.zero_grad()
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(5)
    assert torch.equal(noisy, weight_grads(ours, "llama"))
    assert all(torch.equal(first[name], gradient) for name, gradient in gradients(ours).items())


@pytest.mark.parametrize("config", [lora, lambda **f: lora(use_dora=True, **f), adalora], ids=["lora", "dora", "adalora"])
def test_dropout_has_hf_pefts_mean(config):
    """Of one layer: the mean over masks is the output without dropout."""
    ours, _ = pair("llama", config(lora_dropout=0.5))
    layer = each_layer(ours)[0]
    x = torch.randn(4, 32)
    quiet, trials = layer(x), 3000
    layer.train()
    with torch.no_grad():
        mean = layer(x.repeat(trials, 1)).view(trials, 4, -1).mean(0)
    assert (mean - quiet).norm() < 0.1 * (quiet - layer.base_layer(x)).norm()


# ---- adapters by name -------------------------------------------------------------------------------------------------------


def test_several_adapters_at_once_run_as_in_hf_peft():
    models = pair("llama", lora())
    add(models, lora(r=2, use_rslora=True), "second")
    for model in models:
        model.base_model.set_adapter(["default", "second"])
    assert_same_step(*models, "llama")


def test_dora_beside_lora():
    models = pair("llama", lora())
    add(models, lora(use_dora=True), "second")
    for model in models:
        model.base_model.set_adapter(["default", "second"])
    assert_same_step(*models, "llama")


def test_a_batch_of_mixed_adapters(monkeypatch):
    models = pair("llama", lora())
    add(models, lora(r=2), "second")
    calls, op = [], nf4_linear.nf4_lora_linear_rows
    monkeypatch.setattr(nf4_linear, "nf4_lora_linear_rows", lambda *a: calls.append(1) or op(*a))
    inputs = {"input_ids": torch.randint(1, 61, (4, 9)), "adapter_names": ["second", "__base__", "default", "second"]}
    with torch.no_grad():
        y, expected = (model(**inputs).logits for model in models)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == len(each_layer(models[0]))
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        models[0](input_ids=inputs["input_ids"], adapter_names=["default"])
    with pytest.raises(ValueError, match="DoRA"):
        ours, _ = pair("llama", lora(use_dora=True))
        ours(input_ids=inputs["input_ids"], adapter_names=["default"] * 4)


def test_set_disable_and_delete():
    ours, theirs = models = pair("llama", lora())
    add(models, lora(r=2), "second")
    seen = []
    for model in models:
        second = run(model, "llama")
        model.set_adapter("default")
        default = run(model, "llama")
        with model.disable_adapter():
            base = run(model, "llama")
        model.set_adapter("second")
        assert torch.equal(run(model, "llama"), second)
        model.delete_adapter("second")
        model.set_adapter("default")
        assert torch.equal(run(model, "llama"), default)
        seen.append(torch.stack([second, default, base]))
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)
    assert len({tuple(y.flatten()[:3].tolist()) for y in seen[0]}) == 3


@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties", "magnitude_prune"])
def test_weighted_sums_of_adapters(how: str):
    models = pair("llama", lora())
    add(models, lora(), "second")
    for model in models:
        rest = {"density": 0.5} if how in ("ties", "magnitude_prune") else {}
        model.add_weighted_adapter(["default", "second"], [0.7, 0.4], "both", combination_type=how, svd_rank=4, **rest)
        model.set_adapter("both")
    torch.testing.assert_close(*(run(model, "llama") for model in models), rtol=1e-3, atol=1e-3)


def test_adalora_prunes_as_on_the_decoded_model():
    models = pair("llama", adalora())
    for model in models:
        for step in range(1, 13):
            model.zero_grad()
            weight_grads(model, "llama")
            model.base_model.update_and_allocate(step)
    ours, theirs = ({n: p for n, p in m.named_parameters() if "lora_E" in n} for m in models)
    assert any((E == 0).any() for E in theirs.values())
    for name, E in theirs.items():
        assert torch.equal(E == 0, ours[name] == 0), name
