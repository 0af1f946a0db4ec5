"""LoRA on convolutions: against HF peft where it computes the same, against the merged layer everywhere."""

from __future__ import annotations

import copy

import pytest
import tiny_models as tiny
import torch
from torch import nn

import peftk
from peftk import LoraConfig, adapters_per_row, attach, detach, merge, set_adapter, unmerge
from peftk.checkpoint import adapter_tensors


class ConvNet(nn.Module):
    """Two convolutions of each number of dimensions, and a linear head."""

    def __init__(self, dims: int, **facts):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.dims = dims
        self.stem = conv(4, 8, 3, **facts)
        self.point = conv(8, 6, 1, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.point(torch.tanh(self.stem(x))).flatten(2).mean(2))


def inputs(dims: int) -> torch.Tensor:
    return torch.randn(3, 4, *[7, 6, 5][:dims], generator=torch.Generator().manual_seed(1))


def weighed(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return y.detach()


FIELDS = {"r": 4, "lora_alpha": 6, "target_modules": ["stem", "point"]}
CASES = {
    "1d": (1, {}, {}),
    "1d-stride": (1, {"stride": 2, "padding": 1}, {"use_rslora": True}),
    "2d": (2, {}, {}),
    "2d-all": (2, {"stride": (2, 1), "padding": (1, 2)}, {"target_modules": ["stem", "point", "head"], "bias": "lora_only"}),
    "2d-same": (2, {"padding": "same"}, {"rank_pattern": {"point": 2}}),
    "2d-groups": (2, {"groups": 2}, {}),
    "3d": (3, {"padding": 1}, {"target_modules": ["stem"]}),  # HF peft takes the pointwise one for two-dimensional in a merge
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_and_merged_weights_equal_hf(case):
    dims, facts, fields = CASES[case]
    ours, theirs = tiny.twins(ConvNet(dims, **facts), FIELDS | fields)
    x = inputs(dims)
    torch.testing.assert_close(weighed(ours, x), weighed(theirs, x), rtol=1e-5, atol=1e-6)
    expected = tiny.gradients_of_hf(theirs)
    trained = {key: p for key, p in adapter_tensors(ours, "default").items() if p.requires_grad}
    assert trained.keys() == expected.keys()
    for key, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-4, atol=1e-5)
    if "groups" in case:
        with pytest.raises(ValueError, match=r"^stem: 'default' can't be merged, its convolution has groups=2, .*nothing was"):
            merge(ours)
        with pytest.raises(ValueError, match="names: 'default' in stem can't be combined, its convolution has groups=2"):
            peftk.combine_adapters(ours, ["default"], [1.0], "new")
        return
    merged = theirs.merge_and_unload().state_dict()
    for name, w in detach(merge(ours)).state_dict().items():
        torch.testing.assert_close(w, merged[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("dims", [1, 2])
def test_the_merged_layer_computes_the_same(dims, mode):
    """With dilation and every padding mode: there HF peft's branch has another extent or other edges than the base."""
    model = ConvNet(dims, dilation=2, padding=2, padding_mode=mode)
    y0 = model(inputs(dims)).detach()
    plain = {key: w.clone() for key, w in model.state_dict().items()}
    tiny.fill(attach(model, LoraConfig(**FIELDS)))
    with torch.no_grad():
        y = model(inputs(dims))
        assert not torch.allclose(y, y0, atol=1e-3)
        torch.testing.assert_close(merge(model)(inputs(dims)), y, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(w, plain[key]) for key, w in detach(unmerge(model)).state_dict().items())


@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd"])
def test_combinations(method):
    model = ConvNet(2)
    for i, name in enumerate(("a", "b")):
        tiny.fill(attach(model, LoraConfig(**FIELDS), name), name, seed=i)
    density = 0.7 if method == "ties_svd" else None
    rank = None if method == "cat" else 8
    expected = {path: model.get_submodule(path).merged_weight(["a", "b"]) for path in ("stem", "point")}
    peftk.combine_adapters(model, ["a", "b"], [1.0, 1.0], "new", method, density=density, rank=rank)
    for path, w in expected.items():
        layer = model.get_submodule(path)
        assert layer.lora_B["new"].dim() == 4
        if density is None:
            torch.testing.assert_close(layer.merged_weight(["new"]), w, rtol=1e-4, atol=1e-5)


def test_rows_of_several_adapters():
    model = ConvNet(2)
    for i, name in enumerate(("a", "b")):
        tiny.fill(attach(model, LoraConfig(**FIELDS), name), name, seed=i)
    x = inputs(2)
    with torch.no_grad():
        with adapters_per_row(model, ["b", "__base__", "a"]):
            y = model(x)
        with peftk.disable_adapters(model):
            torch.testing.assert_close(y[1], model(x)[1])
        for row, name in ((0, "b"), (2, "a")):
            set_adapter(model, name)
            torch.testing.assert_close(y[row], model(x)[row])
        with adapters_per_row(model, ["a"] * 3), pytest.raises(ValueError, match=r"names: expected a batch .* got \(4, 7, 6\)"):
            model.stem(x[0])


def test_dropout_and_half_bases():
    model = attach(ConvNet(2), LoraConfig(**FIELDS, lora_dropout=0.5))
    tiny.fill(model)
    x = inputs(2)
    assert not torch.allclose(model(x), model(x))
    half = copy.deepcopy(model.eval()).half()
    attach(half, LoraConfig(r=2, target_modules=["stem"]), "b")
    assert half.stem.lora_A["b"].dtype == torch.float32 and half.stem(x.half()).dtype == torch.float16
    torch.testing.assert_close(model(x), model(x))


def test_starts_and_round_trip(tmp_path):
    model = ConvNet(3)
    y = model(inputs(3)).detach()
    attach(model, LoraConfig(**FIELDS, init_lora_weights="gaussian"))
    torch.testing.assert_close(model(inputs(3)).detach(), y)
    assert model.stem.lora_A["default"].shape == (4, 4, 3, 3, 3) and model.stem.lora_B["default"].shape == (8, 4, 1, 1, 1)
    assert 0.5 < model.stem.lora_A["default"].std() * 4 < 1.5
    tiny.fill(model)
    peftk.save_adapter(model, tmp_path / "conv")
    again = peftk.load_adapter(detach(copy.deepcopy(model)), tmp_path / "conv")
    assert torch.equal(again(inputs(3)), model(inputs(3)))


def test_all_linear_leaves_convolutions_and_groups_need_their_multiple():
    model = attach(ConvNet(2), LoraConfig(target_modules="all-linear"))
    assert type(model.stem) is nn.Conv2d and type(model.head) is not nn.Linear
    model = ConvNet(2, groups=4)
    before = tiny.state_of(model)
    with pytest.raises(ValueError, match="r: expected a multiple of groups=4 for the convolution stem, got 6"):
        attach(model, LoraConfig(r=6, target_modules=["stem"]))
    tiny.assert_same_state(before, tiny.state_of(model))
    with pytest.raises(ValueError, match=r"embeddings or convolutions, got up \(ConvTranspose2d\)"):
        attach(nn.ModuleDict({"up": nn.ConvTranspose2d(2, 2, 2)}), LoraConfig(target_modules=["up"]))
