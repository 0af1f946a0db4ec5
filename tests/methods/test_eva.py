"""EVA's start against HF peft's, what it does to ranks, and what it refuses."""

from __future__ import annotations

import json
import logging
import math
import warnings

import pytest
import torch
from tiny_models import Net, assert_same_state, batch, fill, hf_model, llama, net_batch, run, state_of

import peftk
from peftk import LoraConfig
from peftk.checkpoint import CONFIG
from peftk.methods.attach import attached, wrappers

FIELDS = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], "init_lora_weights": "eva"}


def eva(model, rho: float = 2.0, **fields):
    config = LoraConfig(**{**FIELDS, "eva_config": {"rho": rho}, **fields})
    return peftk.attach(model, config)


def narrow_between() -> Net:
    """v's inputs lie in two directions; q's, embeddings, in ten, and along all of them alike."""
    model = Net()
    torch.nn.init.orthogonal_(model.embed.weight)
    with torch.no_grad():
        for layer in model.layers:
            layer["q"].weight.copy_(torch.randn(32, 2) @ torch.randn(2, 32) * 0.02)
            layer["q"].bias.zero_()
    return model


def ranks_of(model, name: str = "default") -> dict[str, int]:
    return {path: layer.lora_A[name].shape[0] for path, layer in wrappers(model) if name in layer.adapter_names()}


@pytest.mark.parametrize("rho", [1.0, 2.0])
@pytest.mark.parametrize("whiten", [False, True])
def test_equals_hf(rho, whiten):
    """One batch, seen until it settles: HF peft stops a layer's count earlier than peftk's, where batches differ. And HF peft
    whitens directions that layers share once for each of them."""
    peft = pytest.importorskip("peft")
    base, inputs = llama().eval(), batch("llama")
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][0, :3] = -100
    config = {"rho": rho, "whiten": whiten}
    fields = {**FIELDS, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]} if whiten else FIELDS
    theirs = hf_model(base, {**fields, "eva_config": peft.EvaConfig(**config)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.initialize_lora_eva_weights(theirs, [inputs], show_progress_bar=False)
    ours = peftk.eva_init(peftk.attach(base, LoraConfig(**fields, eva_config=config)), [inputs])
    theirs_by_path = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert sum(ranks_of(ours).values()) == 4 * 8 == sum(m.r["default"] for m in theirs_by_path.values())
    for path, layer in wrappers(ours):
        other = theirs_by_path[path]
        both = min(layer.lora_A["default"].shape[0], other.r["default"])
        assert abs(layer.lora_A["default"].shape[0] - other.r["default"]) <= (rho > 1)  # q, k, v tie: their inputs are the same
        A, theirs_A = layer.lora_A["default"][:both].detach(), other.lora_A["default"].weight[:both].detach()
        cosines = (A * theirs_A).sum(1).abs() / A.norm(dim=1) / theirs_A.norm(dim=1)
        assert cosines.min() > 0.99
        torch.testing.assert_close(A.norm(dim=1), theirs_A.norm(dim=1), rtol=0.02, atol=0)
        assert layer.scaling["default"] == pytest.approx(other.scaling["default"]) == pytest.approx(6 / 4)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dora", [False, True])
def test_ranks_go_where_the_inputs_vary(base, dora):
    """v's input lies in two directions: it needs no more, and q gets what it leaves."""
    model = narrow_between()
    if base == "nf4":
        peftk.quantize_model(model, skip=("q",), progress=False)
    y = run(model.eval(), "net").detach()
    eva(model.train(), rho=3, target_modules=["q", "v"], lora_alpha=8, use_dora=dora, use_rslora=True)
    before = model.training
    peftk.eva_init(model, [net_batch(), {"ids": torch.randint(0, 11, (20, 7))}])
    assert model.training is before
    ranks = ranks_of(model)
    assert sum(ranks.values()) == 16
    assert all(ranks.get(f"layers.{i}.v", 0) < ranks[f"layers.{i}.q"] for i in range(2))
    torch.testing.assert_close(run(model.eval(), "net").detach(), y, rtol=1e-5, atol=1e-5)
    for path, layer in wrappers(model):
        A = layer.lora_A["default"]
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=1e-4)
        assert A.requires_grad and layer.scaling["default"] == pytest.approx(2 * ranks[path] / math.sqrt(ranks[path]))
        assert ("default" in layer.lora_magnitude_vector) is dora
    run(model, "net").square().sum().backward()
    assert all(layer.lora_B["default"].grad.any() for _, layer in wrappers(model))


def test_the_directions_are_the_inputs():
    """A layer whose inputs vary along given directions around a mean gets just these."""
    model = torch.nn.Sequential(torch.nn.Linear(32, 24))
    directions = torch.linalg.qr(torch.randn(32, 3))[0].T
    data = [torch.randn(500, 3) * torch.tensor([5.0, 3.0, 2.0]) @ directions + 7 for _ in range(4)]
    peftk.attach(model, LoraConfig(r=3, target_modules=["0"], init_lora_weights="eva", eva_config={"rho": 1}))
    peftk.eva_init(model, data)
    cosines = (model[0].lora_A["default"] @ directions.T).detach()
    torch.testing.assert_close(cosines.abs(), torch.eye(3), rtol=0, atol=0.15)
    torch.testing.assert_close(torch.linalg.svdvals(cosines), torch.ones(3), rtol=1e-3, atol=1e-3)


def test_masked_positions_do_not_count():
    inputs = batch("llama")
    other = {**inputs, "input_ids": inputs["input_ids"].clone(), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    other["attention_mask"][:, 7:] = 0  # causal: what stands behind reaches nothing before it
    made = []
    for ids in (inputs["input_ids"], torch.cat([inputs["input_ids"][:, :7], 60 - inputs["input_ids"][:, 7:]], 1)):
        torch.manual_seed(0)
        model = eva(llama().eval(), rho=1, r=2)
        peftk.eva_init(model, [{**other, "input_ids": ids}])
        made.append(torch.cat([layer.lora_A["default"].detach() for _, layer in wrappers(model) if layer.in_features == 32]))
    torch.testing.assert_close(made[0].abs(), made[1].abs(), rtol=1e-3, atol=1e-4)


def test_layers_without_a_rank_lose_the_adapter_and_the_file_says_so(tmp_path):
    peft = pytest.importorskip("peft")
    base = narrow_between().eval()
    twins = [Net().eval() for _ in range(2)]
    for twin in twins:
        twin.load_state_dict(base.state_dict())
    eva(base, rho=8, r=1, target_modules=["q", "v"])
    peftk.eva_init(base, [{"ids": torch.arange(1, 11)[None]}])
    kept = ranks_of(base)
    assert sum(kept.values()) == 4 and set(kept) == {"layers.0.v", "layers.1.v"} and type(base.layers[0]["q"]) is torch.nn.Linear
    fill(base)
    peftk.save_adapter(base, tmp_path / "a")
    with torch.no_grad():
        expected = run(base, "net")
        loaded = peftk.load_adapter(twins[0], tmp_path / "a")
        assert ranks_of(loaded) == kept
        torch.testing.assert_close(run(loaded, "net"), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.PeftModel.from_pretrained(twins[1], tmp_path / "a")
        torch.testing.assert_close(run(theirs, "net"), expected, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["init_lora_weights"] == "eva"


def test_says_what_has_not_settled(caplog):
    model = eva(Net(), target_modules=["q"], eva_config={"tau": 1.0})
    with caplog.at_level(logging.WARNING, "peftk"):
        peftk.eva_init(model, (net_batch() for _ in range(1)), max_batches=2)
    assert "EVA: the directions of 2 of 2 layers had not settled after the last batch" in caplog.text


@pytest.mark.parametrize(
    ("prepare", "data", "message"),
    [
        (lambda m: peftk.attach(m, LoraConfig(target_modules=["q"])), [net_batch()], "got 'default' with True"),
        (lambda m: fill(eva(m, target_modules=["q"])), [net_batch()], "which is trained: .* layers.0.q"),
        (lambda m: eva(m, target_modules=["q"]), [], "dataloader: expected at least one batch, got none"),
        (lambda m: peftk.merge(eva(m, target_modules=["q"])), [net_batch()], "without merged adapters, got one with default"),
    ],
)  # fmt: skip
def test_what_is_refused_leaves_the_model_as_it_was(prepare, data, message):
    model = prepare(Net())
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        peftk.eva_init(model, data)
    assert_same_state(before, state_of(model))
    assert not any(layer._forward_pre_hooks for _, layer in wrappers(model))


def test_a_layer_that_is_not_reached_is_named():
    model = Net()
    model.spare = torch.nn.Linear(4, 4)
    eva(model, target_modules=["q", "spare"])
    with pytest.raises(ValueError, match="dataloader: expected batches that reach all layers of 'default', got none for spare"):
        peftk.eva_init(model, [net_batch()])
    assert attached(model).active == ["default"]
