"""Weighted combinations, against HF peft's add_weighted_adapter and against the sum itself."""

from __future__ import annotations

import copy
import warnings

import pytest
import tiny_models as tiny
import torch
from torch import nn

import peftk
from peftk import LoraConfig, attach, combine_adapters, set_adapter
from peftk.methods.combine import ALL_METHODS

FIELDS = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
NAMES, WEIGHTS, SEED = ["a", "b", "c"], [0.7, -0.4, 1.3], 5


def adapters(model: nn.Module, ranks: tuple[int, ...] = (4, 4, 4), **fields) -> nn.Module:
    for i, (name, r) in enumerate(zip(NAMES, ranks, strict=True)):
        tiny.fill(attach(model, LoraConfig(**{**FIELDS, "r": r, **fields}), name), name, seed=i)
    return model


def deltas(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """By path what the adapter adds to each weight."""
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, peftk.methods.adapter.AdapterLayer)]
    return {path: layer.delta_weight(name) for path, layer in layers if name in layer.adapter_names()}


def hf_delta(theirs: nn.Module, path: str, name: str) -> torch.Tensor:
    return theirs.base_model.model.get_submodule(path).get_delta_weight(name)


def weighted(model: nn.Module) -> dict[str, torch.Tensor]:
    parts = [(w, deltas(model, name)) for w, name in zip(WEIGHTS, NAMES, strict=True)]
    return {path: sum(w * d[path] for w, d in parts if path in d) for path in {p for _, d in parts for p in d}}


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    """(ours, HF peft's) with the same three adapters."""
    hf = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = tiny.llama()
    ours = adapters(copy.deepcopy(base))
    theirs = hf.get_peft_model(base, hf.LoraConfig(**FIELDS), adapter_name="a")
    for name in NAMES:
        if name != "a":
            theirs.add_adapter(name, hf.LoraConfig(**FIELDS))
        hf.set_peft_model_state_dict(theirs, peftk.checkpoint.adapter_tensors(ours, name), adapter_name=name)
    return ours, theirs


@pytest.mark.parametrize("method", ALL_METHODS)
def test_the_same_weights_as_hf(pair, method, monkeypatch):
    """With DARE's masks drawn from equally seeded generators."""
    ours, theirs = copy.deepcopy(pair)
    density = None if method in ("cat", "linear", "svd") else 0.6
    combine_adapters(ours, NAMES, WEIGHTS, "new", method, density=density, seed=SEED)
    monkeypatch.setattr("peft.tuners.lora.model._freeze_adapter", lambda *_: torch.manual_seed(SEED))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.add_weighted_adapter(NAMES, WEIGHTS, "new", method, density=density)
    for path, delta in deltas(ours, "new").items():
        torch.testing.assert_close(delta, hf_delta(theirs, path, "new"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_electing_signs_as_hf_does(pair, majority):
    ours, theirs = copy.deepcopy(pair)
    facts = {"density": 0.5, "majority_sign_method": majority}
    combine_adapters(ours, NAMES, WEIGHTS, "new", "ties", **facts)
    theirs.add_weighted_adapter(NAMES, WEIGHTS, "new", "ties", **facts)
    for path, delta in deltas(ours, "new").items():
        torch.testing.assert_close(delta, hf_delta(theirs, path, "new"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_cat_is_the_exact_sum(base):
    model = tiny.Net()
    if base == "nf4":
        peftk.quantize_model(model, progress=False)
    for i, (name, targets) in enumerate(zip(NAMES, (["q", "embed"], ["q", "v"], ["v", "head"]), strict=True)):
        config = LoraConfig(r=2 + i, target_modules=targets, rank_pattern={"layers.1.v": 6}, use_rslora=i == 1)
        tiny.fill(attach(model, config, name), name, seed=i)
    expected = weighted(model)
    combine_adapters(model, NAMES, WEIGHTS, "sum")
    got = deltas(model, "sum")
    assert got.keys() == expected.keys() and len(got) == 6
    for path, delta in expected.items():
        torch.testing.assert_close(got[path], delta, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        y = tiny.run(model, "net")
        branches = {name: _outputs(model, name) for name in ("sum", *NAMES)}
    assert torch.equal(y, branches["sum"])


def _outputs(model: nn.Module, name: str) -> torch.Tensor:
    set_adapter(model, name)
    return tiny.run(model, "net")


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_each_layers_own_rank_is_in_the_file(method, tmp_path):
    """HF peft drops rank_pattern; here the file says what each layer has, and both can read it."""
    model = tiny.llama()
    ranks = {"a": {"layers.0.mlp.down_proj": 7}, "b": {"q_proj": 2}, "c": {}}
    for i, (name, pattern) in enumerate(ranks.items()):
        config = LoraConfig(**FIELDS, rank_pattern=pattern, alpha_pattern={"layers.1.self_attn.q_proj": 3.0})
        tiny.fill(attach(model, config, name), name, seed=i)
    expected = weighted(model)
    base = copy.deepcopy(model)
    combine_adapters(model, NAMES, WEIGHTS, "new", method)
    for path, delta in deltas(model, "new").items():
        if method == "cat":
            torch.testing.assert_close(delta, expected[path], rtol=1e-5, atol=1e-6)
        r = model.get_submodule(path).lora_A["new"].shape[0]
        places = {"layers.0.self_attn": (10, 4), "layers.1.self_attn": (10, 4), "layers.0.mlp": (15, 7), "layers.1.mlp": (12, 4)}
        assert r == next(pair for key, pair in places.items() if key in path)[method == "svd"]
    peftk.save_adapter(model, tmp_path / "new", "new")
    again = peftk.load_adapter(peftk.detach(base), tmp_path / "new", "new")
    assert all(torch.equal(delta, deltas(again, "new")[path]) for path, delta in deltas(model, "new").items())
    hf = pytest.importorskip("peft")
    plain = peftk.detach(again)
    theirs = hf.PeftModel.from_pretrained(plain, tmp_path / "new")
    for path, delta in deltas(model, "new").items():
        torch.testing.assert_close(hf_delta(theirs, path, "default"), delta)


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_svd_is_the_nearest_of_its_rank_without_the_sum(rank, monkeypatch):
    model = adapters(tiny.Net(), target_modules=["q", "v", "embed"])
    expected = weighted(model)
    shapes = []
    real = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda w, **k: shapes.append(tuple(w.shape)) or real(w, **k))
    combine_adapters(model, NAMES, WEIGHTS, "new", "svd", rank=rank)
    assert set(shapes) <= {(1, 12, 12), (1, 12, 11), (1, 11, 12)}  # of three ranks of 4, and of 11 tokens: no (n, k) anywhere
    for path, delta in deltas(model, "new").items():
        values = real(expected[path])[1]
        best = values[rank:].norm()
        torch.testing.assert_close((delta - expected[path]).norm(), best, rtol=1e-3, atol=1e-5)
        layer = model.get_submodule(path)
        (A, B), r = layer.matrices("new")[""], min(rank, 12, *expected[path].shape)
        assert (A.shape[1], B.shape[2], layer.scaling["new"]) == (r, r, 1.0)


@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd", "dare_linear"])
def test_adapters_in_sixteen_bits(method):
    model = adapters(tiny.Net(), target_modules=["q", "embed"])
    expected = weighted(model)
    density = None if method in ("cat", "svd") else 1.0
    combine_adapters(model.bfloat16(), NAMES, WEIGHTS, "new", method, density=density, rank=12 if "svd" in method else None)
    for path, delta in deltas(model, "new").items():
        assert delta.dtype == torch.float32
        if method in ("cat", "svd"):
            assert (delta - expected[path]).norm() < 0.02 * expected[path].norm()


def test_dares_masks_follow_the_seed():
    def at(seed: int) -> torch.Tensor:
        model = adapters(tiny.Net(), target_modules=["q"])
        combine_adapters(model, NAMES, WEIGHTS, "new", "dare_linear_svd", density=0.5, seed=seed, rank=32)
        return deltas(model, "new")["layers.0.q"]

    torch.manual_seed(0)
    model = adapters(tiny.Net(), target_modules=["q"])
    expected = weighted(model)["layers.0.q"]
    first = at(1)
    torch.manual_seed(99)
    assert torch.equal(at(1), first) and not torch.allclose(at(2), first, atol=1e-3)
    mean = torch.stack([at(seed) for seed in range(60)]).mean(0)
    assert (mean - expected).norm() < 0.25 * expected.norm() < 0.25 * 4 * (first - expected).norm()


def test_the_new_adapter_is_attached_and_trains():
    model = adapters(tiny.Net(), target_modules=["q"])
    combine_adapters(model, ["a"], [1.0], "new")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"layers.{i}.q.lora_{f}.new" for i in (0, 1) for f in "AB"}
    peftk.delete_adapter(model, "a")
    assert deltas(model, "new")


def test_a_module_that_one_adapter_trains_whole_comes_along():
    model = tiny.Net()
    for name, whole in (("a", None), ("b", ["head"]), ("c", ["head"])):
        tiny.fill(attach(model, LoraConfig(r=2, target_modules=["q"], modules_to_save=whole), name), name)
    combine_adapters(model, ["a", "b"], [1, 2], "new")
    whole = model.head.modules_to_save
    assert torch.equal(whole["new"].weight, whole["b"].weight) and whole["new"].weight is not whole["b"].weight
    with pytest.raises(ValueError, match="names: head is trained whole by b, c: such modules can't be combined"):
        combine_adapters(model, ["b", "c"], [1, 1], "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], [1, 2], "new"), r"weights: expected a finite number for each of 1 adapters, got \[1, 2\]"),
        ((["a", "b"], [1, float("nan")], "new"), r"weights: expected a finite number"),
        (([], [], "new"), r"names: expected a list of different adapters, got \[\]"),
        (("abc", [1, 1, 1], "new"), r"names: expected a list of different adapters, got 'abc'"),
        ((["a", "a"], [1, 1], "new"), r"names: expected a list of different adapters"),
        ((["a", "x"], [1, 1], "new"), r"names: no adapter called 'x'; attached are a, b, c"),
        ((["a", "b"], [1, 1], "a"), r"adapter_name: 'a' is attached already"),
        ((["a", "b"], [1, 1], "new", "mean"), r"method: expected one of cat, linear, .*, got 'mean'"),
        (
            (["a", "c"], [1, 1], "new", "linear"),
            r"method: \'linear\' needs adapters of one rank, got a 4, c 2 in layers\.0\.q; use",
        ),
        ((["a", "b"], [1, 1], "new", "ties"), r"density: expected a share in \(0, 1\] for 'ties', got None"),
    ],
    ids=str,
)
def test_bad_arguments_are_named_and_nothing_changes(arguments, message):
    model = adapters(tiny.Net(), (4, 4, 2), target_modules=["q"])
    before = tiny.state_of(model)
    with pytest.raises(ValueError, match=message):
        combine_adapters(model, *arguments)
    tiny.assert_same_state(before, tiny.state_of(model))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"density": 0.5}, "density: expected None for 'cat', which prunes nothing, got 0.5"),
        ({"method": "ties", "density": 0}, "density: expected a share"),
        ({"rank": 3}, "rank: expected a positive integer, with a method that ends in svd, got 3 with 'cat'"),
        ({"method": "svd", "rank": 0}, "rank: expected a positive integer"),
        ({"method": "ties", "density": 0.5, "majority_sign_method": "most"}, "majority_sign_method: expected one of total, freq"),
    ],
    ids=str,
)
def test_bad_keywords_are_named(keywords, message):
    model = adapters(tiny.Net(), target_modules=["q"])
    with pytest.raises(ValueError, match=message):
        combine_adapters(model, ["a", "b"], [1, 1], "new", **keywords)


def test_an_adapter_that_trains_biases_is_refused():
    model = attach(tiny.Net(), LoraConfig(target_modules=["q"], bias="all"), "a")
    with pytest.raises(ValueError, match="names: expected adapters that leave the base's biases alone, got 'a'"):
        combine_adapters(model, ["a"], [1.0], "new")


def test_only_lora_adapters_have_a_sum():
    model = attach(adapters(tiny.llama()), peftk.PromptTuningConfig(num_virtual_tokens=3), "p")
    with pytest.raises(ValueError, match="names: expected LoRA adapters, got 'p', a PromptTuningConfig"):
        combine_adapters(model, ["a", "p"], [1, 1], "new")


def test_magnitudes_have_no_sum():
    model = attach(tiny.Net(), LoraConfig(target_modules=["q"], use_dora=True), "a")
    with pytest.raises(ValueError, match="names: expected adapters without DoRA, got 'a': magnitudes have no weighted sum"):
        combine_adapters(model, ["a"], [1.0], "new")


def test_an_adapter_that_started_in_the_weight_counts_by_what_it_adds_to_it():
    model = attach(tiny.Net(), LoraConfig(r=3, target_modules=["q"], init_lora_weights="pissa"), "a")
    tiny.fill(attach(model, LoraConfig(r=2, target_modules=["q"]), "b"), "b")
    with torch.no_grad():
        model.layers[0]["q"].lora_B["a"].add_(0.1)
    expected = sum(w * model.layers[0]["q"].delta_weight(name) for w, name in ((0.5, "a"), (2.0, "b")))
    combine_adapters(model, ["a", "b"], [0.5, 2.0], "new")
    torch.testing.assert_close(deltas(model, "new")["layers.0.q"], expected, rtol=1e-4, atol=1e-5)


class Mixed(nn.Module):
    """An embedding, two convolutions and a linear layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv, self.point = nn.Embedding(11, 8), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 9, 1)
        self.line, self.out = nn.Conv1d(3, 7, 2), nn.Linear(9, 5)


@pytest.mark.parametrize("method", ["cat", "linear", "ties", "svd", "magnitude_prune_svd"])
def test_embeddings_and_convolutions_as_hf_does(method):
    hf = pytest.importorskip("peft")
    fields = {"r": 3, "lora_alpha": 6, "target_modules": ["embed", "conv", "point", "out"]}
    if "svd" not in method:  # HF peft decomposes a Conv1d's difference as a batch of matrices, and fails
        fields["target_modules"].append("line")
    base = Mixed()
    ours = copy.deepcopy(base)
    theirs = hf.get_peft_model(base, hf.LoraConfig(**fields), adapter_name="a")
    theirs.add_adapter("b", hf.LoraConfig(**fields))
    for i, name in enumerate(("a", "b")):
        tensors = peftk.checkpoint.adapter_tensors(tiny.fill(attach(ours, LoraConfig(**fields), name), name, seed=i), name)
        hf.set_peft_model_state_dict(theirs, tensors, adapter_name=name)
    density = 0.6 if method in ("ties", "magnitude_prune_svd") else None
    combine_adapters(ours, ["a", "b"], [0.7, -1.2], "new", method, density=density)
    theirs.add_weighted_adapter(["a", "b"], [0.7, -1.2], "new", method, density=density)
    got = deltas(ours, "new")
    assert len(got) == len(fields["target_modules"])
    for path, delta in got.items():
        torch.testing.assert_close(delta, hf_delta(theirs, path, "new"), rtol=1e-4, atol=1e-5)
