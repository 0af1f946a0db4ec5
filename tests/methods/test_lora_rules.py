"""Every rule of lora_rules.py by its message, with the model as it was; and what combines, together."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from tiny_models import Net, assert_same_state, fill, gpt2, run, state_of, weight_grads
from torch import nn

import peftk
from peftk import LoraConfig
from peftk.checkpoint import CONFIG
from peftk.methods.lora_rules import variants_of


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "svd"}, "init_lora_weights: expected True, False, .* got 'svd'"),
        ({"init_lora_weights": "pissa_niter_x"}, "init_lora_weights: .* got 'pissa_niter_x'"),
        (
            {"loftq_config": {"loftq_iter": 2}},
            'loftq_config: expected None unless init_lora_weights is "loftq", got it with True',
        ),
        (
            {"eva_config": {"rho": 2}, "init_lora_weights": "pissa"},
            "eva_config: expected None unless .* \"eva\", got it with 'pissa'",
        ),
        ({"init_lora_weights": "orthogonal", "r": 5}, 'r: expected even ranks for "orthogonal".* got 5'),
        ({"init_lora_weights": "orthogonal", "rank_pattern": {"q": 3}}, "r: expected even ranks .* got 3"),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}},
            "loftq_bits: expected 4, as the weights are NF4, got 8",
        ),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 0}}, "loftq_iter: expected a positive integer, got 0"),
        ({"init_lora_weights": "loftq", "loftq_config": {"bits": 4}}, "loftq_config: expected fields of LoftQConfig, got bits"),
        ({"init_lora_weights": "loftq", "loftq_config": 4}, "loftq_config: expected a LoftQConfig or a dict .* got 4"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 0.5}}, "rho: expected a number of at least 1, got 0.5"),
        ({"init_lora_weights": "eva", "eva_config": {"tau": 2}}, r"tau: expected a cosine in \[0, 1\], got 2"),
        ({"use_dora": "yes"}, "use_dora: expected True or False, got 'yes'"),
    ],
)
def test_configs_that_contradict_themselves(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**fields)


def tied(model: nn.Module) -> nn.Module:
    model.layers[1]["q"].weight = model.layers[0]["q"].weight
    return model


def merged(model: nn.Module) -> nn.Module:
    return peftk.merge(fill(peftk.attach(model, LoraConfig(target_modules=["q"]), "m"), "m"))


def started(model: nn.Module) -> nn.Module:
    return peftk.attach(model, LoraConfig(target_modules=["q"], r=4, init_lora_weights="olora"), "first")


def quantised(model: nn.Module) -> nn.Module:
    return peftk.quantize_model(model, progress=False)


def with_groups(model: nn.Module) -> nn.Module:
    model.conv = nn.Conv1d(4, 4, 3, groups=2)
    return model


def broken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.layers[1]["q"].weight[3, 4] = math.nan
    return model


@pytest.mark.parametrize(
    ("prepare", "fields", "message"),
    [
        (with_groups, {"target_modules": ["q", "conv"], "use_dora": True}, "conv: use_dora needs .* a convolution with groups=2"),
        (with_groups, {"target_modules": ["conv"], "init_lora_weights": "pissa"}, "conv: pissa is not defined for a Conv1d"),
        (None, {"target_modules": ["embed"], "init_lora_weights": "pissa"}, "embed: pissa is not defined for a Embedding"),
        (None, {"target_modules": ["embed"], "init_lora_weights": "eva"}, "embed: eva is not defined for a Embedding"),
        (None, {"target_modules": ["embed"], "init_lora_weights": "orthogonal"}, "embed: orthogonal is not defined for"),
        (tied, {"init_lora_weights": "pissa"}, "layers.0.q: pissa changes the stored weight, which is tied to another module's"),
        (merged, {"init_lora_weights": "pissa"}, "layers.0.q: pissa needs the weight .* m is merged into it; unmerge first"),
        (merged, {"use_dora": True}, "layers.0.q: use_dora needs the weight .* m is merged into it; unmerge first"),
        (started, {"init_lora_weights": "pissa"}, "layers.0.q: pissa takes its start .* as 'first' did already"),
        (quantised, {"init_lora_weights": "loftq"}, "layers.0.q: loftq .* is in 4 bits already: .* peftk.qlora does"),
        (None, {"init_lora_weights": "pissa", "r": 33}, r"layers.0.q: r: expected at most 32 .* got 33"),
        (None, {"init_lora_weights": "pissa", "lora_alpha": -1}, "layers.0.q: expected a positive scaling to decompose a weight"),
        (broken, {"init_lora_weights": "olora"}, "layers.1.q: expected a finite weight to start from, got NaN or Inf"),
        (lambda model: model.to("meta"), {"init_lora_weights": "pissa"}, "layers.0.q: pissa needs .* it is on the meta device"),
    ],
)  # fmt: skip
def test_layers_that_cannot(prepare, fields, message):
    model = prepare(Net()) if prepare else Net()
    before = state_of(model) if prepare not in (broken, None) and not model.head.weight.is_meta else None
    with pytest.raises(ValueError, match=message):
        peftk.attach(model, LoraConfig(**{"target_modules": ["q"], **fields}), "new")
    if before is not None:
        assert_same_state(before, state_of(model))


@pytest.mark.parametrize(
    ("kind", "base", "message"),
    [
        ("pissa_niter_4", "dense", "its start was a randomised decomposition"),
        ("loftq", "dense", "its start was another program's quantisation"),
        ("pissa", "nf4", "its start was a decomposition of the dense weight, and this model's is in 4 bits"),
    ],
)
def test_files_whose_start_is_lost(kind, base, message, tmp_path):
    peftk.save_adapter(peftk.attach(Net(), LoraConfig(target_modules=["q"])), tmp_path / "a")
    fields = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**fields, "init_lora_weights": kind}))
    model = quantised(Net()) if base == "nf4" else Net()
    before = state_of(model)
    with pytest.raises(ValueError, match=message) as error:
        peftk.load_adapter(model, tmp_path / "a")
    assert str(tmp_path / "a" / CONFIG) in str(error.value)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_no_file_after_quantising_the_rest(kind, tmp_path):
    model = peftk.attach(quantised(Net()), LoraConfig(target_modules=["q"], r=4, init_lora_weights=kind))
    with pytest.raises(ValueError, match="default took its start .* no LoRA file on the original weights computes the same"):
        peftk.save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


STARTS = ["orthogonal", "gaussian", "eva", "pissa", "pissa_niter_2", "olora", "loftq"]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("dora", "rslora"), itertools.product([False, True], repeat=2))
@pytest.mark.parametrize("base", ["dense", "nf4", "conv1d"])
def test_all_else_combines(start, dora, rslora, base):
    """Every start with DoRA, rsLoRA, patterns, dropout, beside another adapter, on each base: it starts at W, and trains."""
    if base == "nf4" and start == "loftq":
        pytest.skip("test_layers_that_cannot")
    kind, target = ("gpt2", "c_attn") if base == "conv1d" else ("net", "q")
    model = (gpt2() if base == "conv1d" else Net()).eval()
    model = quantised(model) if base == "nf4" else model
    y = run(model, kind).detach()
    config = LoraConfig(
        r=4, lora_alpha=3, target_modules=[target], init_lora_weights=start, use_dora=dora, use_rslora=rslora, lora_dropout=0.1,
        rank_pattern={rf"0\.(attn\.)?{target}": 2},
    )  # fmt: skip
    peftk.attach(model, LoraConfig(target_modules=[target]), "other")
    peftk.attach(model, config, "new")
    peftk.set_adapter(model, ["other", "new"])
    loose = base == "nf4" and start in ("pissa", "pissa_niter_2", "olora") or start == "loftq"
    torch.testing.assert_close(run(model, kind).detach(), y, rtol=0.1 if loose else 1e-3, atol=0.6 if loose else 1e-3)
    optimizer = torch.optim.SGD(peftk.lora_plus_groups(model, 1e-4, 2), lr=1e-4)
    weight_grads(model.train(), kind)
    names = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is not None and p.grad.any()}
    assert sum("lora_B.new" in name for name in names) == 2 and sum("magnitude_vector.new" in name for name in names) == 2 * dora
    before = run(model.eval(), kind).detach()
    optimizer.step()
    assert not torch.equal(run(model, kind), before)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 3}},
        {"init_lora_weights": "eva", "eva_config": {"rho": 1.5, "tau": 0.9}},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=str,
)
def test_fields_go_both_ways(fields):
    peft = pytest.importorskip("peft")
    ours = LoraConfig(target_modules=["q"], **fields)
    if "loftq_config" in fields:
        pytest.importorskip("scipy", reason="HF peft's LoftQ asks for it")
    eva = {"eva_config": peft.EvaConfig(**fields["eva_config"])} if "eva_config" in fields else {}
    theirs = peft.LoraConfig(target_modules=["q"], **{**fields, **eva})
    written = json.loads(json.dumps(theirs.to_dict(), default=list))
    assert LoraConfig.from_dict(written) == LoraConfig(target_modules=["q"], inference_mode=False, **fields)
    back = peft.LoraConfig.from_peft_type(**json.loads(json.dumps(ours.to_dict())))
    assert back.use_dora == theirs.use_dora and back.init_lora_weights == theirs.init_lora_weights
    assert back.eva_config == theirs.eva_config
    assert all(back.loftq_config[key] == value for key, value in theirs.loftq_config.items())
    assert LoraConfig.from_dict(ours.to_dict()) == LoraConfig(target_modules=["q"], inference_mode=True, **fields)


def test_what_a_config_asks():
    assert variants_of(LoraConfig()) == [] and variants_of(LoraConfig(use_rslora=True, init_lora_weights="gaussian")) == []
    assert variants_of(LoraConfig(use_dora=True, init_lora_weights="pissa_niter_3")) == ["use_dora", "pissa"]
