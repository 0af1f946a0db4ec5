"""LoRA against HF peft, against its formula, and at its start."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from numerics import row_scaled
from tiny_models import (
    MODELS,
    Net,
    batch,
    bert,
    fill,
    gpt2,
    gradients_of_hf,
    hf_model,
    llama,
    net_batch,
    run,
    t5,
    twins,
    weight_grads,
)
from torch import nn

import peftk
from peftk.checkpoint import adapter_tensors
from peftk.methods.lora_embedding import LoraEmbedding
from peftk.methods.lora_linear import LoraLinear

CASES = {
    "llama-default": ("llama", {"r": 4, "lora_alpha": 12}),
    "llama-all-linear": ("llama", {"r": 3, "target_modules": "all-linear"}),
    "llama-rslora": ("llama", {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
    "llama-rank-pattern": (
        "llama",
        {
            "r": 4,
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
            "alpha_pattern": {"k_proj": 3, r"model\.layers\.0\.self_attn\.q_proj": 24},
        },
    ),
    "llama-regex": ("llama", {"target_modules": r".*layers\.1\..*(k|o)_proj"}),
    "llama-exclude": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": ["down_proj", "model.layers.0.self_attn.o_proj"]},
    ),
    "llama-exclude-regex": ("llama", {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"}),
    "llama-layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    "llama-layers-pattern": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    ),
    "llama-bias-all": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "llama-bias-lora-only": ("llama", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "llama-embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "r": 4, "lora_alpha": 8}),
    "llama-head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "gpt2-default": ("gpt2", {"r": 4, "fan_in_fan_out": True}),
    "gpt2-all-linear": ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "gpt2-wte": ("gpt2", {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}),
    "bert-default": ("bert", {"r": 4, "modules_to_save": ["classifier"]}),
    "bert-all": ("bert", {"target_modules": "all-linear", "modules_to_save": ["classifier", "pooler"], "bias": "none"}),
    "bert-bias-all": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "bert-word-embeddings": ("bert", {"target_modules": ["word_embeddings", "key"]}),
    "t5-default": ("t5", {"r": 4}),
    "t5-wo": ("t5", {"target_modules": ["wo", "wi", "k"]}),
    "net-padding": ("net", {"target_modules": ["embed", "q"], "modules_to_save": ["head"]}),
    "net-all-linear": ("net", {"target_modules": "all-linear", "bias": "all"}),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_hf(case):
    kind, fields = CASES[case]
    ours, theirs = twins(MODELS[kind](), fields)
    y, y_hf = weight_grads(ours, kind), weight_grads(theirs, kind)
    torch.testing.assert_close(y, y_hf, rtol=1e-5, atol=1e-5)
    trained = {key: p for key, p in adapter_tensors(ours, "default").items() if p.requires_grad}
    expected = gradients_of_hf(theirs)
    assert trained.keys() == expected.keys()
    assert {id(p) for p in trained.values()} == {id(p) for p in peftk.trainable_parameters(ours)}
    for key, parameter in trained.items():
        atol = 1e-5 * max(1.0, expected[key].abs().max().item())  # against fp64 both are 1e-6 of the largest off
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-4, atol=atol, msg=lambda m, key=key: f"{key}: {m}")
    with torch.no_grad(), peftk.disable_adapters(ours):
        assert not torch.allclose(run(ours, kind), y, atol=1e-3)


@pytest.mark.parametrize("rslora", [False, True])
def test_scale(rslora):
    model = peftk.attach(Net(), peftk.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=["q"]))
    layer = fill(model).layers[0]["q"]
    x = torch.randn(3, 32)
    A, B, scale = layer.lora_A["default"], layer.lora_B["default"], 6 / (2 if rslora else 4)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + scale * x @ A.T @ B.T)
    torch.testing.assert_close(layer.delta_weight("default"), scale * B @ A)


def test_kaiming_is_the_papers():
    layer = LoraLinear(nn.Linear(256, 64))
    layer.add_adapter("a", 16, 1.0, peftk.LoraConfig())
    A = layer.lora_A["a"]
    bound = 1 / math.sqrt(256)  # Kaiming-uniform with a = sqrt(5)
    assert A.shape == (16, 256) and A.abs().max() <= bound
    assert abs(A.std().item() - bound / math.sqrt(3)) < 0.03 * bound
    assert layer.lora_B["a"].shape == (64, 16) and not layer.lora_B["a"].any()
    hf = hf_model(nn.Sequential(nn.Linear(256, 64)), {"r": 16, "target_modules": ["0"]}).base_model.model[0]
    torch.testing.assert_close(A.std(), hf.lora_A["default"].weight.std(), rtol=0.05, atol=0)


def test_gaussian_and_random_starts():
    layer = LoraLinear(nn.Linear(256, 64))
    layer.add_adapter("g", 16, 1.0, peftk.LoraConfig(init_lora_weights="gaussian"))
    layer.add_adapter("r", 16, 1.0, peftk.LoraConfig(init_lora_weights=False))
    assert abs(layer.lora_A["g"].std().item() * 16 - 1) < 0.05 and layer.lora_A["g"].abs().max() > 3 / 16
    assert not layer.lora_B["g"].any()
    assert layer.lora_B["r"].abs().max() <= 1 / math.sqrt(16) and layer.lora_B["r"].any()


def test_an_embeddings_start():
    for start in (True, "gaussian", False):
        layer = LoraEmbedding(nn.Embedding(100, 64))
        layer.add_adapter("a", 8, 1.0, peftk.LoraConfig(init_lora_weights=start))
        A, B = layer.lora_embedding_A["a"], layer.lora_embedding_B["a"]
        assert A.shape == (8, 100) and B.shape == (64, 8)
        assert bool(A.any()) is (start is False) and abs(B.std() - 1) < 0.15


def test_adapters_are_fp32_whatever_the_default_is():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = peftk.attach(Net(), peftk.LoraConfig(target_modules=["q", "embed"]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in peftk.trainable_parameters(model)} == {torch.float32}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_starts_at_the_base(kind, base):
    model = MODELS[kind]().eval()
    if base == "nf4":
        peftk.quantize_model(model, progress=False)
    targets = "all-linear" if kind != "t5" else ["q", "v", "wi", "wo"]
    plain = run(model.requires_grad_(False), kind)  # torch itself rounds otherwise where a weight wants a gradient
    peftk.attach(model, peftk.LoraConfig(target_modules=targets))
    y = run(model, kind)
    with peftk.disable_adapters(model):
        assert torch.equal(run(model, kind), plain)
    if base == "nf4" and kind != "t5":  # whose wo is left dense
        assert torch.equal(y, plain)
    torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5)  # without an adapter torch multiplies with a dense weight


def test_starts_at_the_base_on_every_implementation(implementation):
    linear = peftk.nn.NF4Linear.from_linear(nn.Linear(80, 24))
    linear.set_dense_weight(row_scaled(24, 80))
    layer = LoraLinear(linear)
    for name in ("a", "b"):
        layer.add_adapter(name, 4, 2.0, peftk.LoraConfig())
    layer.set_active(["a", "b"])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(5, 80, dtype=dtype)
        y = layer(x)
        assert torch.equal(y, linear(x)) and y.dtype == dtype


@pytest.mark.parametrize("kind", ["llama", "gpt2", "net"])
def test_nf4_base_equals_its_decoded_twin(kind):
    """Outputs and gradients on 4 bits are those of LoRA on the decoded weights."""
    model = peftk.quantize_model(MODELS[kind](), progress=False)
    dense = copy.deepcopy(model)
    for path, module in list(dense.named_modules()):
        if isinstance(module, peftk.nn.NF4Linear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight, linear.bias = nn.Parameter(module.dense_weight()), module.bias
            parent, _, child = path.rpartition(".")
            setattr(dense.get_submodule(parent), child, linear)
    config = peftk.LoraConfig(target_modules="all-linear", r=4, lora_alpha=8)
    for each in (model, dense):
        fill(peftk.attach(each, copy.deepcopy(config)))
    torch.testing.assert_close(weight_grads(model, kind), weight_grads(dense, kind), rtol=1e-4, atol=1e-5)
    other = adapter_tensors(dense, "default")
    for key, parameter in adapter_tensors(model, "default").items():
        torch.testing.assert_close(parameter.grad, other[key].grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_bases_with_fp32_adapters(base, dtype):
    model = Net().to(dtype)
    if base == "nf4":
        peftk.quantize_model(model, progress=False)
    fill(peftk.attach(model, peftk.LoraConfig(target_modules=["q", "v", "embed"])))
    trained = peftk.trainable_parameters(model)
    assert {p.dtype for p in trained} == {torch.float32}
    y = weight_grads(model, "net")
    assert y.dtype == dtype and all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any() for p in trained)
    exact = copy.deepcopy(model).float()
    torch.testing.assert_close(y.float(), run(exact, "net").detach(), rtol=0.05, atol=0.05)


def test_to_another_dtype_leaves_nf4_bytes_alone():
    model = peftk.quantize_model(Net(), progress=False)
    peftk.attach(model, peftk.LoraConfig(target_modules=["q"]))
    layer = model.layers[0]["q"]
    before = [t.clone() for t in layer.base_layer.w4.tensors()]
    model.to(torch.bfloat16)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, layer.base_layer.w4.tensors(), strict=True))
    assert layer.lora_A["default"].dtype == torch.bfloat16 and layer.bias.dtype == torch.bfloat16
    assert run(model, "net").dtype == torch.bfloat16


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_dropout_only_in_training_and_by_the_seed(base):
    model = Net()
    if base == "nf4":
        peftk.quantize_model(model, progress=False)
    fill(peftk.attach(model, peftk.LoraConfig(target_modules=["q"], lora_dropout=0.5)))
    peftk.attach(model, peftk.LoraConfig(target_modules=["q"], lora_dropout=0.5), "second")
    peftk.set_adapter(fill(model, "second"), ["default", "second"])

    def at(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return run(model, "net").detach()

    first, again, other = at(1), at(1), at(2)
    assert torch.equal(first, again) and not torch.allclose(first, other)
    model.eval()
    assert torch.equal(at(1), at(2)) and not torch.allclose(at(1), first)


def test_dropout_is_of_the_branchs_input_and_keeps_the_mean():
    layer = LoraLinear(nn.Linear(4, 3))
    layer.add_adapter("a", 2, 1.5, peftk.LoraConfig(lora_dropout=0.25))
    layer.set_active(["a"])
    nn.init.normal_(layer.lora_B["a"])
    x = torch.randn(1, 4).expand(40_000, 4)
    with torch.no_grad():
        branch = layer(x) - layer.base_layer(x)
        expected = 1.5 * x[0] @ layer.lora_A["a"].T @ layer.lora_B["a"].T
    torch.testing.assert_close(branch.mean(0), expected, rtol=0.05, atol=0.02)
    assert len(branch.round(decimals=4).unique(dim=0)) == 2**4  # each of 4 inputs is dropped or not


def test_checkpointing_repeats_the_dropout():
    model = fill(peftk.attach(llama(), peftk.LoraConfig(target_modules="all-linear", lora_dropout=0.3)))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(7)
        weight_grads(model.train(), "llama")
        gradients.append([p.grad.clone() for p in peftk.trainable_parameters(model)])
    assert model.is_gradient_checkpointing
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_autocast(base):
    model = Net()
    if base == "nf4":
        peftk.quantize_model(model, progress=False)
    fill(peftk.attach(model, peftk.LoraConfig(target_modules=["q", "v"])))
    exact = run(model, "net").detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = weight_grads(model, "net")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    assert not torch.equal(y.float(), exact)
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in peftk.trainable_parameters(model))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "net"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_copies_are_equal_and_apart(kind, copied, base):
    model = MODELS[kind]()
    plain = [type(module) for module in model.modules()]
    if base == "nf4":
        peftk.quantize_model(model, skip=("lm_head", "head"), progress=False)
        plain = [type(module) for module in model.modules()]
    saved = ["head"] if kind == "net" else []
    fill(peftk.attach(model, peftk.LoraConfig(modules_to_save=saved, target_modules="all-linear")))
    y = run(model, kind)
    twin = copied(model)
    assert torch.equal(run(twin, kind), y)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    fill(twin, scale=0.5, seed=9)
    assert torch.equal(run(model, kind), y) and not torch.allclose(run(twin, kind), y)
    assert [type(module) for module in peftk.detach(twin).modules()] == plain
    assert torch.equal(run(model, kind), y)
    assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in model.parameters())


def test_what_models_read_of_a_layer():
    model = peftk.attach(gpt2(), peftk.LoraConfig(target_modules=["c_attn", "wte"]))
    layer = model.transformer.h[0].attn.c_attn
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias
    assert (layer.in_features, layer.out_features) == (32, 96)
    assert model.get_input_embeddings().weight is model.lm_head.weight
    assert model.transformer.wte.num_embeddings == 61 and model.transformer.wte.embedding_dim == 32


def test_t5_reads_wo_after_a_cast():
    """T5 casts to wo.weight.dtype: a wrapped wo must answer with floats."""
    model = peftk.quantize_model(t5(), progress=False)
    fill(peftk.attach(model, peftk.LoraConfig(target_modules=["q", "wo"])))
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.is_floating_point()
    assert run(model, "t5").isfinite().all()


def test_training_lowers_the_loss_and_leaves_the_base():
    model = peftk.quantize_model(llama(), progress=False)
    peftk.attach(model, peftk.LoraConfig(r=8, target_modules="all-linear"))
    trained = {id(p) for p in peftk.trainable_parameters(model)}
    frozen = {name: p.clone() for name, p in model.named_parameters() if id(p) not in trained}
    optimizer = torch.optim.AdamW(peftk.trainable_parameters(model), lr=2e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(**batch("llama")).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    named = dict(model.named_parameters())
    assert frozen and all(torch.equal(named[name], value) for name, value in frozen.items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"r: expected a positive integer, got 0"),
        ({"r": 2.0}, r"r: expected a positive integer, got 2\.0"),
        ({"r": True}, r"r: expected a positive integer, got True"),
        ({"lora_alpha": "16"}, r"lora_alpha: expected a finite number, got '16'"),
        ({"lora_alpha": math.nan}, r"lora_alpha: expected a finite number, got nan"),
        ({"lora_dropout": 1.0}, r"lora_dropout: expected a probability in \[0, 1\), got 1\.0"),
        ({"lora_dropout": "0.1"}, r"lora_dropout: expected a probability"),
        ({"target_modules": "("}, r"target_modules: expected names or a regular expression, got '\('"),
        ({"target_modules": 3}, r"target_modules: expected names or a regular expression, got 3"),
        ({"exclude_modules": [1]}, r"exclude_modules: expected names or a regular expression"),
        ({"modules_to_save": "head"}, r"modules_to_save: expected a list of names, got 'head'"),
        ({"bias": "some"}, r'bias: expected "none", "all" or "lora_only", got \'some\''),
        ({"init_lora_weights": "corda"}, "init_lora_weights: expected True, False, 'gaussian', .*pissa_niter_N.*, got 'corda'"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern: expected regular expressions with positive ranks"),
        ({"rank_pattern": None}, r"rank_pattern: expected"),
        ({"rank_pattern": {"(": 1}}, r"rank_pattern: expected regular expressions"),
        ({"alpha_pattern": {"q": "x"}}, r"alpha_pattern: expected regular expressions with finite numbers"),
        (
            {"target_modules": "all-linear", "layers_to_transform": [0]},
            r"layers_to_transform: expected numbers of layers, or None where target_modules",
        ),
        ({"layers_pattern": "h"}, r"layers_pattern: expected names, or None where layers_to_transform is None"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        peftk.LoraConfig(**fields)


def test_sets_become_sorted_lists():
    config = peftk.LoraConfig(target_modules={"v", "q"}, modules_to_save=("head",))
    assert config.target_modules == ["q", "v"] and config.modules_to_save == ["head"]


def test_config_to_a_dict_and_back():
    config = peftk.LoraConfig(r=3, target_modules=["q"], rank_pattern={"q": 2}, bias="all", modules_to_save=["head"])
    fields = config.to_dict()
    assert fields["peft_type"] == "LORA" and fields["inference_mode"] is True
    again = peftk.LoraConfig.from_dict(fields)
    assert {**vars(again), "inference_mode": False} == vars(config)
    theirs = pytest.importorskip("peft").LoraConfig(r=3, target_modules=["q"], rank_pattern={"q": 2}, bias="all").to_dict()
    from_theirs = peftk.LoraConfig.from_dict(theirs)
    assert (from_theirs.r, from_theirs.target_modules, from_theirs.rank_pattern) == (3, ["q"], {"q": 2})


def test_padding_gets_no_gradient():
    model = fill(peftk.attach(Net(), peftk.LoraConfig(target_modules=["embed"])))
    ids = net_batch()["ids"].clone()
    ids[:, :2] = 0
    model(ids).sum().backward()
    gradient = model.embed.lora_embedding_A["default"].grad
    assert not gradient[:, 0].any() and gradient[:, 1:].any()


def test_bert_head_is_trained_whole():
    model = peftk.attach(bert(), peftk.LoraConfig(modules_to_save=["classifier"]))
    weight_grads(model, "bert")
    assert model.classifier.modules_to_save["default"].weight.grad.any()
    assert model.classifier.original_module.weight.grad is None
    assert model.classifier.out_features == 3 and model.classifier.weight is model.classifier.modules_to_save["default"].weight
