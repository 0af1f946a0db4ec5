"""LoRA on fused experts: against HF peft's target_parameters on dense weights, against the decoded twin on 4 bits."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import tiny_models as tiny
import torch
from numerics import Largest
from torch import nn

import peftk
from peftk import LoraConfig, adapters_per_row, attach, detach, disable_adapters, merge, set_adapter, unmerge
from peftk.checkpoint import adapter_tensors
from peftk.methods.lora_experts import LoraExperts
from peftk.nn import NF4Linear

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
FIELDS = {"r": 3, "lora_alpha": 6, "target_parameters": BOTH, "target_modules": []}


def model(kind: str = "mixtral", base: str = "dense") -> nn.Module:
    torch.manual_seed(0)
    made = tiny.MIXTURES[kind]()
    return peftk.quantize_model(made, progress=False) if base == "nf4" else made


def logits(m: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return tiny.run(m, "llama")


def decoded(m: nn.Module) -> nn.Module:
    """The same model with dense weights: each 4-bit matrix decoded."""
    twin = copy.deepcopy(m)
    for path, layer in list(twin.named_modules()):
        if isinstance(layer, NF4Linear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            linear.weight, linear.bias = nn.Parameter(layer.dense_weight()), layer.bias
            twin.set_submodule(path, peftk.nn.base_layer(linear))
    return twin


CASES = {
    "mixtral": ("mixtral", {}),
    "mixtral-one": ("mixtral", {"target_parameters": ["mlp.experts.down_proj"], "use_rslora": True}),
    "mixtral-modules-too": (
        "mixtral",
        {"target_modules": ["q_proj"], "rank_pattern": {"down_proj": 2, "q_proj": 5}, "alpha_pattern": {"gate_up_proj": 9}},
    ),
    "mixtral-no-defaults": ("mixtral", {"target_modules": None}),
    "gpt_oss": ("gpt_oss", {}),
    "gpt_oss-one-layer": ("gpt_oss", {"target_parameters": ["layers.1.mlp.experts.gate_up_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_files_and_merged_weights_equal_hf(case):
    kind, fields = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = tiny.twins(model(kind), FIELDS | fields)
        y, y_hf = tiny.weight_grads(ours, "llama"), tiny.weight_grads(theirs, "llama")
    torch.testing.assert_close(y, y_hf, rtol=1e-4, atol=1e-5)
    with disable_adapters(ours):
        assert not torch.allclose(logits(ours), y, atol=1e-3)
    expected = tiny.gradients_of_hf(theirs)
    trained = {key: p for key, p in adapter_tensors(ours, "default").items() if p.requires_grad}
    assert trained.keys() == expected.keys()
    for key, parameter in trained.items():
        atol = 1e-5 * max(1.0, expected[key].abs().max().item())
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-3, atol=atol, msg=lambda m, key=key: f"{key}: {m}")
    before = {name: p.clone() for name, p in detach(copy.deepcopy(ours)).state_dict().items()}
    merged = theirs.merge_and_unload().state_dict()
    got = detach(merge(ours)).state_dict()
    assert got.keys() == merged.keys() == before.keys()
    for name, w in got.items():
        torch.testing.assert_close(w, merged[name], rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(w, before[name]) for name, w in got.items())


@pytest.mark.parametrize("kind", tiny.MIXTURES)
def test_nf4_equals_its_decoded_twin(kind):
    ours = tiny.fill(attach(model(kind, "nf4"), LoraConfig(**FIELDS)))
    dense = decoded(ours)
    torch.testing.assert_close(tiny.weight_grads(ours, "llama"), tiny.weight_grads(dense, "llama"), rtol=1e-4, atol=1e-4)
    other = adapter_tensors(dense, "default")
    for key, parameter in adapter_tensors(ours, "default").items():
        atol = 1e-4 * other[key].grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, other[key].grad, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_starts_at_the_base_and_detaches_to_it(base):
    m = model("gpt_oss", base)
    flags = {name: p.requires_grad for name, p in m.named_parameters()}
    plain, y = [type(module) for module in m.modules()], logits(m)
    attach(m, LoraConfig(**FIELDS | {"r": 4, "init_lora_weights": "orthogonal"}), "second")
    attach(m, LoraConfig(**FIELDS))
    for names in ("default", "second"):
        set_adapter(m, names)
        torch.testing.assert_close(logits(m), y, rtol=1e-5, atol=1e-5)
    with disable_adapters(m):
        assert torch.equal(logits(m), y)
    assert {name.split(".")[-3] for name, p in m.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    tiny.fill(m, "second")
    detach(m)
    assert [type(module) for module in m.modules()] == plain and torch.equal(logits(m), y)
    assert {name: p.requires_grad for name, p in m.named_parameters()} == flags


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_merge_and_exact_unmerge(base):
    m = model("mixtral", base)
    before = tiny.snapshot(m)
    tiny.fill(attach(m, LoraConfig(**FIELDS), "a"), "a")
    tiny.fill(attach(m, LoraConfig(**{**FIELDS, "target_parameters": BOTH[1:]}), "b"), "b", seed=4)
    y = {}
    for names in ("a", "b", ["a", "b"]):
        set_adapter(m, names)
        y[str(names)] = logits(m)
    report = merge(m, dry_run=True)
    assert len(report.weights) == 2 * 2 * 4 and report["model.layers.1.mlp.experts.down_proj[3]"].adapters == ("a", "b")
    merge(m, "b")
    layer = m.model.layers[0].mlp.experts
    assert {part.parameter for part in layer.parts(["b"])} == {"down_proj"}  # what b has no branch for isn't rounded again
    merge(m, "a")
    error = (logits(m) - y["['a', 'b']"]).norm() / y["a"].norm()
    assert error < (1e-5 if base == "dense" else 0.5)
    unmerge(m)
    set_adapter(m, ["a", "b"])
    assert torch.equal(logits(m), y["['a', 'b']"])
    after = detach(m).state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], w) for key, w in before.items())


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_nothing_as_large_as_one_experts_matrix_is_made(base):
    """128 x 128, four experts, of which HF peft makes a difference, and the sum with it, in every forward pass."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.MixtralConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    holder = nn.ModuleDict({"experts": transformers.models.mixtral.modeling_mixtral.MixtralExperts(config)})
    for p in holder.parameters():
        nn.init.normal_(p, std=0.1)
    if base == "nf4":
        peftk.quantize_model(holder, progress=False)
    tiny.fill(attach(holder, LoraConfig(**FIELDS | {"target_parameters": ["experts.down_proj", "experts.gate_up_proj"]})))
    x = torch.randn(10, 128, requires_grad=True)
    index = torch.tensor([[0, 1], [3, 0], [1, 3], [0, 3], [1, 0]]).repeat(2, 1)
    with Largest() as seen:
        holder["experts"](x, index, torch.rand(10, 2)).sum().backward()
    assert x.grad.any() and all(p.grad.any() for p in peftk.trainable_parameters(holder))
    assert 10 * 128 <= seen.numel < 128 * 128


def test_a_broken_expert_is_named():
    m = tiny.fill(attach(model("mixtral", "nf4"), LoraConfig(**FIELDS)))
    with torch.no_grad():
        m.model.layers[1].mlp.experts.lora_A["down_proj"]["default"][2 * 3 + 1, 0] = float("inf")
    before = tiny.state_of(m)
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.experts\.down_proj\[2\]: expected finite .* with default;"):
        merge(m)
    tiny.assert_same_state(before, tiny.state_of(m))


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_files_go_round(base, tmp_path):
    m = tiny.fill(attach(model("gpt_oss", base), LoraConfig(**FIELDS, rank_pattern={"down_proj": 5})))
    peftk.save_adapter(m, tmp_path / "moe")
    again = peftk.load_adapter(model("gpt_oss", base), tmp_path / "moe")
    torch.testing.assert_close(logits(again), logits(m))
    if base == "dense":
        hf = pytest.importorskip("peft")
        theirs = hf.PeftModel.from_pretrained(model("gpt_oss"), tmp_path / "moe")
        torch.testing.assert_close(logits(theirs), logits(m), rtol=1e-4, atol=1e-5)
        theirs.save_pretrained(tmp_path / "hf")
        again = peftk.load_adapter(model("gpt_oss"), tmp_path / "hf")
        torch.testing.assert_close(logits(again), logits(m))


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_rows_of_several_adapters(base):
    m = model("mixtral", base)
    for i, name in enumerate(("a", "b")):
        targets = BOTH if name == "a" else BOTH[:1]
        tiny.fill(
            attach(m, LoraConfig(**{**FIELDS, "target_parameters": targets, "target_modules": ["q_proj"]}), name), name, seed=i
        )
    ids = torch.randint(1, 61, (4, 9))
    with torch.no_grad():
        with adapters_per_row(m, ["b", "__base__", "a", "b"]):
            y = m(input_ids=ids).logits
        for row, name in enumerate(["b", None, "a", "b"]):
            if name is None:
                with disable_adapters(m):
                    alone = m(input_ids=ids[row : row + 1]).logits
            else:
                set_adapter(m, name)
                alone = m(input_ids=ids[row : row + 1]).logits
            torch.testing.assert_close(y[row : row + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["cat", "svd", "dare_ties_svd"])
def test_combinations_expert_by_expert(method, tmp_path):
    m = model()
    for i, (name, targets) in enumerate((("a", BOTH), ("b", BOTH[1:]))):
        fields = FIELDS | {"r": 2 + i, "target_parameters": targets, "target_modules": ["q_proj"] if i else []}
        tiny.fill(attach(m, LoraConfig(**fields), name), name, seed=i)
    layer = m.model.layers[1].mlp.experts
    expected = {part.label: part.merged_weight(["a", "b"]) for part in layer.parts(["a", "b"])}
    facts = {} if method == "cat" else {"rank": 5}
    peftk.combine_adapters(m, ["a", "b"], [1.0, 1.0], "new", method, **facts, density=0.5 if "dare" in method else None)
    assert layer.lora_A["gate_up_proj"]["new"].shape[0] == (2 if method == "cat" else 5) * 4 or method == "svd"
    assert isinstance(m.model.layers[0].self_attn.q_proj, peftk.methods.lora_linear.LoraLinear)
    if method != "dare_ties_svd":
        for part in layer.parts(["new"]):
            torch.testing.assert_close(part.merged_weight(["new"]), expected[part.label], rtol=1e-4, atol=1e-5)
    peftk.save_adapter(m, tmp_path / "new", "new")
    torch.testing.assert_close(logits(peftk.load_adapter(model(), tmp_path / "new")), logits(m))


def test_dropout_two_adapters_half_bases_and_checkpointing():
    m = tiny.fill(attach(model("mixtral", "nf4").bfloat16(), LoraConfig(**FIELDS, lora_dropout=0.4)))
    attach(m, LoraConfig(**FIELDS), "second")
    set_adapter(tiny.fill(m, "second"), ["default", "second"])
    assert {p.dtype for p in peftk.trainable_parameters(m)} == {torch.float32}
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        m.zero_grad()
        torch.manual_seed(7)
        tiny.weight_grads(m.train(), "llama")
        gradients.append([p.grad.clone() for p in peftk.trainable_parameters(m)])
    assert all(g.any() for g in gradients[0])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)
    m.eval()
    assert torch.equal(logits(m), logits(m))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_apart(copied):
    m = tiny.fill(attach(model("gpt_oss"), LoraConfig(**FIELDS)))
    y, twin = logits(m), copied(m)
    assert torch.equal(logits(twin), y)
    tiny.fill(twin, scale=0.5, seed=9)
    assert torch.equal(logits(m), y) and not torch.allclose(logits(twin), y)
    detach(merge(twin))
    assert torch.equal(logits(m), y)


def test_training_lowers_the_loss_on_four_bits():
    m = attach(model("mixtral", "nf4"), LoraConfig(**FIELDS))
    optimizer = torch.optim.AdamW(peftk.trainable_parameters(m), lr=3e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = m(**tiny.batch("llama")).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_all_linear_leaves_experts_as_hf_does():
    m = attach(model("mixtral", "nf4"), LoraConfig(target_modules="all-linear"))
    assert not any(isinstance(module, LoraExperts) for module in m.modules())
    names = {name for name, p in m.named_parameters() if p.requires_grad}
    assert names and not any("experts" in name for name in names)
    assert "4 bits" in str(peftk.report(m))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_parameters": ["experts.up"]},
            r"target_parameters: expected names of experts' weights, got 'experts\.up'",
        ),
        (
            {"target_parameters": ["q_proj.weight"]},
            r"fused experts by .*, got model\.layers\.0\.self_attn\.q_proj\.weight",
        ),
        ({"target_parameters": "experts.down_proj"}, r"target_parameters: expected a list of names, got 'experts\.down_proj'"),
        ({**FIELDS, "use_dora": True}, r"experts: use_dora is not defined for a MixtralExperts"),
        ({**FIELDS, "init_lora_weights": "pissa"}, r"experts: pissa is not defined for a MixtralExperts"),
        ({"target_modules": []}, r"target_modules: expected names of the model's layers, got \[\], which matches none"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_refused_leaves_the_model_as_before(fields, message):
    m = model()
    before = tiny.state_of(m)
    with pytest.raises(ValueError, match=message):
        attach(m, LoraConfig(**fields))
    tiny.assert_same_state(before, tiny.state_of(m))


def test_qlora_with_experts_and_without():
    m = peftk.qlora(model(), peftk.qlora_config(r=2, target_parameters=BOTH), progress=False)
    tiny.weight_grads(m.train(), "llama")
    trained = {name: p for name, p in m.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values()) and sum("experts" in name for name in trained) == 8
    assert isinstance(m.model.layers[0].mlp.experts.base_layer.down_proj[0], NF4Linear)
    with torch.autocast("cpu", torch.bfloat16):
        y = tiny.run(m.eval(), "llama")
    torch.testing.assert_close(y.float(), logits(m), rtol=0.1, atol=0.1)
    plain = peftk.qlora(model(), skip=("experts",), progress=False)
    assert type(plain.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
