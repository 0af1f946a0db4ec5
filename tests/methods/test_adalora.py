"""AdaLoRA's config, its layers beside HF peft's, and its files both ways."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    MODELS,
    Net,
    assert_same_state,
    batch,
    fill,
    gradients_of_hf,
    hf_model,
    llama,
    run,
    state_of,
    twins,
    weight_grads,
)
from torch import nn

import peftk
from peftk.checkpoint import adapter_tensors
from peftk.methods.adalora_linear import AdaLoraLinear

CASES = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "llama-all": ("llama", {"target_modules": "all-linear", "init_r": 5, "target_r": 2, "lora_alpha": 20}),
    "llama-alpha-0": ("llama", {"target_modules": ["o_proj"], "lora_alpha": 0}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "bert": ("bert", {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "bias": "lora_only"}),
    "t5": ("t5", {"target_modules": ["q", "v", "wi"]}),
    "net": ("net", {"target_modules": ["q", "v"]}),
}


def config(**changes) -> peftk.AdaLoraConfig:
    return peftk.AdaLoraConfig(**{"total_step": 100, "target_modules": ["q", "v"], "init_r": 4, "target_r": 2, **changes})


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_hf(case):
    kind, fields = CASES[case]
    ours, theirs = twins(MODELS[kind](), {"total_step": 100, **fields}, "AdaLoraConfig")
    y, y_hf = weight_grads(ours, kind), weight_grads(theirs, kind)
    torch.testing.assert_close(y, y_hf, rtol=1e-5, atol=1e-5)
    trained = {key: p for key, p in adapter_tensors(ours, "default").items() if p.requires_grad}
    expected = gradients_of_hf(theirs)
    assert trained.keys() == expected.keys()
    for key, parameter in trained.items():
        atol = 1e-5 * max(1.0, expected[key].abs().max().item())
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-4, atol=atol, msg=lambda m, key=key: f"{key}: {m}")
        assert parameter.grad.any(), key
    with torch.no_grad(), peftk.disable_adapters(ours):
        assert not torch.equal(run(ours, kind), y)


def test_start():
    torch.manual_seed(0)
    model = peftk.attach(Net(256), config(target_modules=["q"], init_r=64))
    layer = model.layers[0]["q"]
    A, E, B = layer.triplets("default")
    assert A.shape == (64, 256) and E.shape == (64, 1) and B.shape == (256, 64) and not E.any()
    assert abs(A.std() / 0.02 - 1) < 0.05 and abs(B.std() / 0.02 - 1) < 0.05
    random = peftk.attach(Net(), config(init_lora_weights=False)).layers[0]["q"]
    assert random.lora_E["default"].all() and random.lora_A["default"].std() > 0.5
    theirs = hf_model(Net(256), {"target_modules": ["q"], "init_r": 64, "total_step": 9}, "AdaLoraConfig")
    assert abs(theirs.base_model.model.layers[0]["q"].lora_A["default"].std() / A.std() - 1) < 0.05


def test_the_formula_and_its_scale():
    layer = fill(peftk.attach(Net(), config(lora_alpha=6))).layers[0]["q"]
    A, E, B = layer.triplets("default")
    x = torch.randn(3, 32)
    change = B @ torch.diag(E[:, 0]) @ A * 6 / (4 + 1e-5)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ change.T)
    torch.testing.assert_close(layer.delta_weight("default"), change)


def test_all_linear_layers_are_the_default():
    model = peftk.attach(llama(), peftk.AdaLoraConfig(total_step=10))
    found = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, AdaLoraLinear)}
    assert found == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_merge_detach_and_disable(base):
    model = Net().requires_grad_(False)
    if base == "nf4":
        peftk.quantize_model(model, progress=False)
    plain, before = run(model, "net"), {k: v.clone() for k, v in model.state_dict().items()}
    fill(peftk.attach(model, config()), scale=0.4)
    peftk.attach(model, config(target_modules=["q"]), "second")
    peftk.set_adapter(fill(model, "second", scale=0.4, seed=5), ["default", "second"])
    layer = model.layers[0]["q"]
    y, w = run(model, "net"), layer.base_layer.dense_weight().clone()
    with peftk.disable_adapters(model):
        assert torch.equal(run(model, "net"), plain)
    peftk.merge(model)
    summed = w + layer.delta_weight("default") + layer.delta_weight("second")
    if base == "dense":
        torch.testing.assert_close(run(model, "net"), y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.base_layer.weight, summed)
    else:  # one requantisation of the sum, on the bytes
        again = peftk.quantize_nf4(summed)
        assert torch.equal(layer.base_layer.w4.packed.flatten(), again.packed.flatten())
        assert torch.equal(layer.base_layer.w4.absmax, again.absmax)
    peftk.unmerge(model)
    assert torch.equal(run(model, "net"), y)
    peftk.detach(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(run(model, "net"), plain)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_rows_of_a_batch_have_adapters_of_their_own(base):
    model = Net()
    if base == "nf4":
        peftk.quantize_model(model, progress=False)
    fill(peftk.attach(model, config()))
    fill(peftk.attach(model, config(target_modules=["v"], init_r=3), "default2"), "default2")
    names = ["default2", "__base__", "default"]
    with torch.no_grad(), peftk.adapters_per_row(model, names):
        together = run(model, "net")
    for row, name in enumerate(names):
        peftk.set_adapter(model, [] if name == "__base__" else name)
        torch.testing.assert_close(together[row], run(model, "net")[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_dropout_only_in_training(base):
    model = Net()
    if base == "nf4":
        peftk.quantize_model(model, progress=False)
    fill(peftk.attach(model, config(lora_dropout=0.5)))
    torch.manual_seed(1)
    first = run(model, "net")
    torch.manual_seed(1)
    assert torch.equal(run(model, "net"), first)
    assert not torch.equal(run(model, "net"), first)
    model.eval()
    assert torch.equal(run(model, "net"), run(model, "net"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_bases_with_fp32_triplets(dtype):
    model = peftk.quantize_model(Net().to(dtype), progress=False)
    fill(peftk.attach(model, config()))
    y = weight_grads(model, "net")
    trained = peftk.trainable_parameters(model)
    assert y.dtype == dtype and {p.grad.dtype for p in trained} == {torch.float32}
    torch.testing.assert_close(y.float(), run(copy.deepcopy(model).float(), "net"), rtol=0.05, atol=0.05)


PATTERN = {
    "model.layers.0.self_attn.q_proj.lora_E": [True, False, True, False],
    "model.layers.0.self_attn.v_proj.lora_E": [False, False, False, False],
    "model.layers.1.self_attn.q_proj.lora_E": [True, True, True, True],
    "model.layers.1.self_attn.v_proj.lora_E": [False, False, False, True],
}
FIELDS = {"target_modules": ["q_proj", "v_proj"], "init_r": 4, "target_r": 2, "total_step": 100, "task_type": "CAUSAL_LM"}


def logits(model: nn.Module) -> torch.Tensor:
    """Without labels: HF peft's AdaLoRA loaded for inference fails where a loss is asked for."""
    return model(input_ids=batch("llama")["input_ids"]).logits


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_hf_reads_ours(pruned, tmp_path):
    hf = pytest.importorskip("peft")
    base = llama().eval()
    ours = peftk.attach(copy.deepcopy(base), peftk.AdaLoraConfig(**FIELDS, rank_pattern=PATTERN if pruned else None))
    peftk.save_adapter(fill(ours), tmp_path / "a")
    theirs = hf.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    y = logits(ours)
    torch.testing.assert_close(logits(theirs), y, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(base), y, atol=1e-4)
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert saved["base_model.model.model.layers.0.self_attn.q_proj.lora_A"].shape == ((2 if pruned else 4), 32)
    assert saved["base_model.model.model.layers.0.self_attn.v_proj.lora_B"].shape == (16, 0 if pruned else 4)
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert fields["peft_type"] == "ADALORA" and fields["rank_pattern"] == (PATTERN if pruned else None)
    again = peftk.load_adapter(copy.deepcopy(base), tmp_path / "a")
    assert torch.equal(logits(again), y)
    assert peftk.report(again).adapters == peftk.report(ours).trainable


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_we_read_hfs(pruned, tmp_path):
    base = llama().eval()
    theirs = hf_model(base, FIELDS, "AdaLoraConfig")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    if pruned:
        theirs.peft_config["default"].rank_pattern = dict(PATTERN)
        with torch.no_grad():
            for key, flags in PATTERN.items():
                theirs.base_model.model.get_parameter(f"{key}.default")[~torch.tensor(flags)] = 0
    y = logits(theirs)
    theirs.save_pretrained(tmp_path / "a")
    ours = peftk.load_adapter(copy.deepcopy(base), tmp_path / "a", is_trainable=True)
    torch.testing.assert_close(logits(ours), y, rtol=1e-5, atol=1e-5)
    rows = sum(map(sum, PATTERN.values())) if pruned else 16
    assert sum(p.numel() for key, p in adapter_tensors(ours, "default").items() if key.endswith("lora_E")) == rows


def test_an_adapter_of_rank_0_is_the_base_and_trains_on():
    model = peftk.attach(Net(), config(target_modules=["q"], rank_pattern={"layers.0.q.lora_E": [False] * 4}))
    assert model.layers[0]["q"].rank("default") == 0 and model.layers[1]["q"].rank("default") == 4
    weight_grads(fill(model), "net")
    assert model.layers[0]["q"].lora_A["default"].grad is None and model.layers[1]["q"].lora_A["default"].grad.any()
    peftk.unmerge(peftk.merge(model))
    with peftk.adapters_per_row(model, ["default", "__base__", "default"]):
        assert run(model, "net").isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_step": None}, "total_step: expected a positive integer, the optimizer steps of the whole training, got None"),
        ({"total_step": 0}, "total_step: expected a positive integer"),
        ({"target_r": 5}, r"target_r: expected a positive integer of at most init_r \(4\), got 5"),
        ({"target_r": 0}, "target_r: expected a positive integer"),
        ({"init_r": 0}, "init_r: expected a positive integer, got 0"),
        ({"tinit": 60, "tfinal": 40}, r"tinit: expected an integer from 0 to below total_step - tfinal \(60\).*got 60"),
        ({"tinit": -1}, "tinit: expected an integer from 0"),
        ({"tfinal": -1}, "tfinal: expected an integer of at least 0, got -1"),
        ({"deltaT": 0}, "deltaT: expected a positive integer, got 0"),
        ({"beta1": 1.0}, "beta1: expected a number between 0 and 1, got 1.0"),
        ({"beta2": 0}, "beta2: expected a number between 0 and 1, got 0"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight: expected a number of at least 0, got -0.1"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights: expected True or False, got 'gaussian'"),
        ({"use_rslora": True}, "use_rslora: expected False, which AdaLoRA has no other meaning for, got True"),
        ({"alpha_pattern": {"q": 2}}, "alpha_pattern: expected {}"),
        ({"rank_pattern": {"layers.0.q.lora_E": [True]}}, r"rank_pattern: expected paths with lists of init_r \(4\) booleans"),
        ({"rank_pattern": {"q": 4}}, "rank_pattern: expected paths with lists of init_r"),
        ({"lora_dropout": 1.0}, "lora_dropout: expected a probability"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_r_is_not_used(caplog):
    config(r=16)
    assert "r: AdaLoRA doesn't use it, got 16" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["embed"]}, r"target_modules: expected linear layers or convolutions, got embed \(Embedding\)"),
        ({"rank_pattern": {"layers.0.k.lora_E": [True] * 4}}, "rank_pattern: expected paths of modules.*got layers.0.k"),
    ],
)
def test_what_cannot_be_attached_changes_nothing(changes, message):
    model = Net()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        peftk.attach(model, config(**changes))
    assert_same_state(before, state_of(model))


def test_another_method_on_the_same_layer_is_refused():
    model = peftk.attach(Net(), peftk.LoraConfig(target_modules=["q"]), "lora")
    with pytest.raises(ValueError, match=r"layers.0.q \(LoraLinear\)"):
        peftk.attach(model, config(), "ada")
    peftk.attach(model, config(target_modules=["v"]), "ada")
    peftk.set_adapter(fill(fill(model, "lora"), "ada"), ["lora", "ada"])
    y = run(model, "net")
    peftk.delete_adapter(model, "ada")
    assert not torch.equal(run(model, "net"), y) and isinstance(model.layers[0]["v"], nn.Linear)


def test_no_weighted_combination():
    model = peftk.attach(peftk.attach(Net(), config(), "a"), config(), "b")
    with pytest.raises(ValueError, match="names: expected LoRA adapters, got 'a', a AdaLoraConfig"):
        peftk.combine_adapters(model, ["a", "b"], [1.0, 1.0], "c")


def test_training_lowers_the_loss():
    model = peftk.quantize_model(llama(), progress=False)
    peftk.attach(model, peftk.AdaLoraConfig(total_step=25, init_r=6, target_r=3, tinit=3, tfinal=8))
    optimizer = torch.optim.AdamW(peftk.trainable_parameters(model), lr=3e-2)
    peftk.adalora_schedule(model, optimizer)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(**batch("llama")).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
