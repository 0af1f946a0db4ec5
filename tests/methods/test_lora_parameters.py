"""LoRA on parameters of modules that nobody knows, against HF peft."""

from __future__ import annotations

import copy

import pytest
import tiny_models as tiny
import torch
from torch import nn

import peftk
from peftk import LoraConfig, adapters_per_row, attach, detach, disable_adapters, merge, set_adapter, unmerge
from peftk.checkpoint import adapter_tensors


class OwnMixture(nn.Module):
    """All experts at once, by a product that no protocol describes; and a plain matrix."""

    def __init__(self, is_transposed: bool):
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, 8, 8))  # square, so that no shape says which way round it is
        self.down = nn.Parameter(torch.randn(8, 8) / 3)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor, *, gate: float) -> torch.Tensor:
        up = self.up if self.is_transposed else self.up.mT
        return torch.tanh(gate * torch.einsum("bk,ekn->bn", x, up)) @ self.down * self.scale


class Holder(nn.Module):
    def __init__(self, is_transposed: bool = False):
        super().__init__()
        self.mix, self.head = OwnMixture(is_transposed), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(x, gate=0.5))


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
CASES = {
    "both": {"target_parameters": ["mix.up", "mix.down"], "target_modules": []},
    "one": {"target_parameters": ["down"], "target_modules": ["head"], "use_rslora": True},
    "linear": {"target_parameters": ["head.weight", "up"], "target_modules": []},
}


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_files_and_merged_weights_equal_hf(case, is_transposed):
    torch.manual_seed(0)
    ours, theirs = tiny.twins(Holder(is_transposed), {"r": 2, "lora_alpha": 6, **CASES[case]})
    runs = []
    for model in (ours, theirs):
        y = model(X)
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
        runs.append(y.detach())
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-5)
    expected = tiny.gradients_of_hf(theirs)
    trained = {key: p for key, p in adapter_tensors(ours, "default").items() if p.requires_grad}
    assert trained.keys() == expected.keys()
    for key, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-4, atol=1e-5)
    assert not [name for name, p in ours.named_parameters() if p.grad is not None and "lora" not in name]
    merged = theirs.merge_and_unload().state_dict()
    for name, w in detach(merge(ours)).state_dict().items():
        torch.testing.assert_close(w, merged[name], rtol=1e-5, atol=1e-5)


def test_several_adapters_merge_and_unmerge():
    model = Holder(True)
    before, y = tiny.snapshot(model), model(X).detach()
    for i, (name, case) in enumerate(zip("ab", ("both", "one"), strict=True)):
        tiny.fill(attach(model, LoraConfig(r=2, **CASES[case]), name), name, seed=i)
    with torch.no_grad():
        set_adapter(model, ["a", "b"])
        together = model(X)
        with disable_adapters(model):
            assert torch.equal(model(X), y)
        torch.testing.assert_close(merge(model)(X), together, rtol=1e-4, atol=1e-5)
        assert torch.equal(unmerge(model)(X), together)
        assert torch.equal(copy.deepcopy(model)(X), together)
    after = detach(model).state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], w) for key, w in before.items())


def test_a_failing_forward_leaves_the_parameters():
    model = tiny.fill(attach(Holder(), LoraConfig(r=2, **CASES["both"])))
    with pytest.raises(RuntimeError):
        model.mix(torch.randn(2, 3), gate=1.0)
    assert model.mix.base_layer.up is model.mix.base_layer._parameters["up"]


def test_rows_are_refused():
    model = attach(Holder(), LoraConfig(r=2, **CASES["both"]), "a")
    with (
        adapters_per_row(model, ["a"] * 6),
        pytest.raises(ValueError, match="names: expected adapters that can differ .* OwnMixture"),
    ):
        model(X)


def test_combination_and_file(tmp_path):
    torch.manual_seed(0)
    model = Holder()
    base = copy.deepcopy(model)
    for i, name in enumerate("ab"):
        tiny.fill(attach(model, LoraConfig(r=2 + i, **CASES["both"]), name), name, seed=i)
    expected = {part.label: part.merged_weight(["a", "b"]) for part in model.mix.parts(["a", "b"])}
    peftk.combine_adapters(model, ["a", "b"], [1, 1], "new")
    for part in model.mix.parts(["new"]):
        torch.testing.assert_close(part.merged_weight(["new"]), expected[part.label], rtol=1e-4, atol=1e-5)
    peftk.save_adapter(model, tmp_path / "new", "new")
    torch.testing.assert_close(peftk.load_adapter(base, tmp_path / "new")(X), model(X))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_parameters": ["mix.scale"]},
            r"expected dense matrices .*, got mix\.scale, torch\.float32 of shape \(8,\)",
        ),
        ({"target_parameters": ["mix.up"], "lora_dropout": 0.1}, r"lora_dropout: expected 0 with mix\.up, .*, got 0\.1"),
        (
            {"target_parameters": ["head.weight"], "target_modules": ["head"]},
            r"target_parameters: head is adapted whole",
        ),
        ({"target_parameters": ["up"], "use_dora": True}, r"mix: use_dora is not defined for a OwnMixture"),
        (
            {"target_parameters": ["nothing"]},
            r"got 'nothing', which matches none; experts' weights are called nothing",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_refused_leaves_the_model_as_before(fields, message):
    model = Holder()
    before = tiny.state_of(model)
    with pytest.raises(ValueError, match=message):
        attach(model, LoraConfig(**fields))
    tiny.assert_same_state(before, tiny.state_of(model))


def test_four_bits_and_other_adapters_are_refused():
    model = peftk.quantize_model(Holder(), skip=(), progress=False)
    with pytest.raises(ValueError, match=r"expected dense matrices or stacks of them, got head\.weight, torch\.uint8"):
        attach(model, LoraConfig(target_parameters=["head.weight"]))
    model = attach(Holder(), LoraConfig(target_modules=["head"]), "a")
    with pytest.raises(
        ValueError, match=r"target_parameters: head\.weight can't be adapted, another kind of adapter stands there"
    ):
        attach(model, LoraConfig(target_parameters=["head.weight"]), "b")
