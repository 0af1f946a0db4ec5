"""DoRA against HF peft, against its formula, and what keeps its norms."""

from __future__ import annotations

import copy

import pytest
import torch
from numerics import Largest, row_scaled
from tiny_models import MODELS, Net, fill, gradients_of_hf, llama, run, twins, weight_grads
from torch import nn

import peftk
from peftk.checkpoint import adapter_tensors
from peftk.methods import dora, lora_conv, lora_linear
from peftk.methods.attach import wrappers
from peftk.methods.lora_linear import LoraLinear

CASES = {
    "llama-all": ("llama", {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"}),
    "llama-rslora": ("llama", {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
    "llama-bias": ("llama", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only", "rank_pattern": {"q_proj": 3}}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "llama-embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "r": 4, "lora_alpha": 8}),
    "net-padding": ("net", {"target_modules": ["embed"]}),
    "net": ("net", {"target_modules": ["q", "v", "out.0"], "modules_to_save": ["head"]}),
}


def layer_with(names: str = "a", base: str = "dense", n: int = 24, k: int = 80, **fields) -> LoraLinear:
    """Its factors and magnitudes are moved away from the start."""
    linear = nn.Linear(k, n)
    with torch.no_grad():
        linear.weight.copy_(row_scaled(n, k)).requires_grad_(False)
    layer = LoraLinear(peftk.nn.NF4Linear.from_linear(linear) if base == "nf4" else linear).eval()
    for name in names:
        config = peftk.LoraConfig(**{"use_dora": True, **fields})
        layer.add_adapter(name, 4, 1.5, config)
        with torch.no_grad():
            layer.lora_B[name].normal_(std=0.3)
            if name in layer.lora_magnitude_vector:
                layer.lora_magnitude_vector[name].mul_(torch.rand(n) + 0.5)
    layer.set_active(names)
    return layer


def adapted(layer: LoraLinear, name: str) -> torch.Tensor:
    """g (W + s B A) by the definition, in fp64."""
    v = layer.read_weight().double() + layer.scaling[name] * layer.lora_B[name].double() @ layer.lora_A[name].double()
    return layer.lora_magnitude_vector[name].double()[:, None] * v / v.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_hf(case):
    kind, fields = CASES[case]
    ours, theirs = twins(MODELS[kind](), {**fields, "use_dora": True})
    y, y_hf = weight_grads(ours, kind), weight_grads(theirs, kind)
    torch.testing.assert_close(y, y_hf, rtol=1e-4, atol=1e-4)
    trained = {key: p for key, p in adapter_tensors(ours, "default").items() if p.requires_grad}
    expected = {key.replace("vector.weight", "vector"): grad for key, grad in gradients_of_hf(theirs).items()}
    assert trained.keys() == expected.keys() and any("magnitude" in key for key in trained)
    for key, parameter in trained.items():
        atol = 3e-5 * max(1.0, expected[key].abs().max().item())
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-3, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_the_norm_without_the_product(base):
    layer = layer_with(base=base)
    v = layer.read_weight().double() + 1.5 * (layer.lora_B["a"].double() @ layer.lora_A["a"].double())
    torch.testing.assert_close(dora.weight_norm(layer, "a").double(), v.norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_is_the_formula(base, dtype):
    layer = layer_with(base=base).to(dtype)
    x = torch.randn(3, 5, 80).to(dtype)
    expected = x.double() @ adapted(layer, "a").T + layer.bias.double()
    size = expected.abs().amax(dim=(0, 1))
    with torch.no_grad():
        error = ((layer(x).double() - expected).abs() / size).max()
    assert layer(x).dtype == dtype and error < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_starts_at_the_base(base):
    model = llama().eval()
    if base == "nf4":
        peftk.quantize_model(model, progress=False)
    plain = run(model, "llama")
    peftk.attach(model, peftk.LoraConfig(target_modules="all-linear", use_dora=True))
    torch.testing.assert_close(run(model, "llama"), plain, rtol=1e-5, atol=1e-5)
    for _, layer in wrappers(model):
        assert torch.equal(dora.scale(layer, "default"), torch.ones(layer.out_features))
    with peftk.disable_adapters(model):
        torch.testing.assert_close(run(model, "llama"), plain)


def test_the_norm_gets_no_gradient():
    """Section 4.3: with the norm a constant, dL/dB is g times that of LoRA."""
    layer, x = layer_with(), torch.randn(7, 80)
    W, A, B, m = layer.weight, layer.lora_A["a"], layer.lora_B["a"], layer.lora_magnitude_vector["a"]
    v = W + 1.5 * B @ A
    for norm, is_same in ((v.norm(dim=1, keepdim=True).detach(), True), (v.norm(dim=1, keepdim=True), False)):
        (grad,) = torch.autograd.grad(layer(x).square().sum(), B)
        (expected,) = torch.autograd.grad((x @ (m[:, None] * v / norm).T + layer.bias).square().sum(), B, retain_graph=True)
        assert bool((grad - expected).norm() < 1e-4 * expected.norm()) is is_same


def test_dropout_as_hf_applies_it(monkeypatch):
    """In training W x keeps all of x, and what the adapter adds sees D(x): also its (g - 1) W part. HF peft gets our mask."""
    peft = pytest.importorskip("peft")
    ours, theirs = twins(Net(), {"target_modules": ["q"], "use_dora": True, "lora_dropout": 0.5})
    mask = (torch.rand(3, 7, 32) < 0.5) * 2.0
    monkeypatch.setattr(lora_linear, "philox_dropout", lambda x, p, seed: x * mask)
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.lora_dropout["default"].forward = lambda x: x * mask
    y, y_hf = weight_grads(ours.train(), "net"), weight_grads(theirs.train(), "net")
    torch.testing.assert_close(y, y_hf, rtol=1e-4, atol=1e-4)
    expected = {key.replace("vector.weight", "vector"): grad for key, grad in gradients_of_hf(theirs).items()}
    for key, parameter in adapter_tensors(ours, "default").items():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(run(ours.eval(), "net"), y, atol=1e-2)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_adapters_add_up_beside_plain_lora(base):
    """Each adapter adds its own change of W, in whatever order; HF peft's eval mode scales what the ones before it added."""
    layer = layer_with("ab", base)
    layer.add_adapter("plain", 4, 0.5, peftk.LoraConfig(init_lora_weights=False))
    x = torch.randn(6, 80)
    w = layer.read_weight().double()
    delta = adapted(layer, "a") + adapted(layer, "b") - 2 * w
    delta += 0.5 * layer.lora_B["plain"].double() @ layer.lora_A["plain"].double()
    expected = x.double() @ (w + delta).T + layer.bias.double()
    size = expected.abs().amax(dim=0)
    for names in (["a", "b", "plain"], ["plain", "b", "a"]):
        layer.set_active(names)
        assert ((layer(x) - expected).abs() / size).max() < 1e-5
        assert ((layer.merged_weight(names) - (w + delta)).abs().amax(1) / w.abs().amax(1)).max() < 1e-5


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_rows(base):
    model = Net().eval()
    if base == "nf4":
        peftk.quantize_model(model, progress=False)
    fill(peftk.attach(model, peftk.LoraConfig(target_modules=["q"], use_dora=True), "d"), "d")
    fill(peftk.attach(model, peftk.LoraConfig(target_modules=["q", "v"]), "p"), "p")
    with torch.no_grad():
        expected = []
        for row, name in enumerate(("d", "p", None)):
            peftk.set_adapter(model, [name] if name else [])
            expected.append(run(model, "net")[row])
        with peftk.adapters_per_row(model, ["d", "p", "__base__"]):
            y = run(model, "net")
    torch.testing.assert_close(y, torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_merge_and_exact_unmerge(base):
    model = Net().eval()
    if base == "nf4":
        peftk.quantize_model(model, progress=False)
    fill(peftk.attach(model, peftk.LoraConfig(target_modules=["q"], use_dora=True)))
    layer = model.layers[0]["q"]
    with torch.no_grad():
        before, expected = run(model, "net"), adapted(layer, "default").float()
    stored = layer.take_snapshot()
    peftk.merge(model)
    if base == "dense":
        torch.testing.assert_close(layer.base_layer.dense_weight(), expected)
        torch.testing.assert_close(run(model, "net"), before, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(layer.base_layer.w4.packed.flatten(), peftk.quantize_nf4(expected).packed.flatten())
    peftk.unmerge(model)
    again = layer.take_snapshot()
    tensors = lambda s: [s] if isinstance(s, torch.Tensor) else [t for t in s.tensors() if t is not None]  # noqa: E731
    assert all(torch.equal(a, b) for a, b in zip(tensors(stored), tensors(again), strict=True))
    with torch.no_grad():
        assert torch.equal(run(model, "net"), before)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_nothing_of_the_weights_size_is_made(base):
    """After the first call: ||W||^2 is kept."""
    layer = layer_with(base=base, n=256, k=512).train()
    x = torch.randn(8, 512, requires_grad=True)
    with Largest() as seen:
        layer(x).sum().backward()
    assert 0 < seen.numel <= 8 * 512
    layer.norms.drop()
    with Largest() as seen, torch.no_grad():
        layer(x)
    assert base == "dense" or seen.numel == 256 * 512


def truth(layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
    return (x.double() @ adapted(layer, "a").T + layer.bias.double()).to(x.dtype)


def _merge_another(layer: LoraLinear) -> None:
    layer.add_adapter("b", 2, 1.0, peftk.LoraConfig(init_lora_weights=False))
    layer.merge(["b"], keep_original=True, is_tied=False)
    layer.unmerge()
    layer.base_layer.set_dense_weight(layer.base_layer.dense_weight() * 2 + 1)


CHANGES = {
    "a step on A": lambda layer: layer.lora_A["a"].normal_(),
    "a step on m": lambda layer: layer.lora_magnitude_vector["a"].mul_(2),
    "W set": lambda layer: layer.base_layer.set_dense_weight(layer.base_layer.dense_weight().flip(0) * 3),
    "W loaded": lambda layer: layer.base_layer.load_state_dict(nn.Linear(80, 24).state_dict()),
    "W loaded by assignment": lambda layer: layer.base_layer.load_state_dict(nn.Linear(80, 24).state_dict(), assign=True),
    "another dtype": lambda layer: layer.to(torch.float64),
    "merged, unmerged, set": _merge_another,
}


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_changes_drops_the_kept_norms(base, change):
    layer = layer_with(base=base)
    x = torch.randn(4, 80)
    first = layer(x)
    assert "a" in layer.norms.scales and torch.equal(layer(x), first)
    CHANGES[change](layer)
    if change == "another dtype":
        assert layer.norms.squares is None and not layer.norms.scales
        x = x.double()
    expected = truth(layer, x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_step_that_no_version_counts_is_seen():
    """An optimizer that writes through an address: g is kept only between calls without gradients."""
    layer = layer_with()
    x = torch.randn(4, 80)
    with torch.no_grad():
        layer(x)
    layer(x)
    layer.lora_B["a"].data.mul_(3)
    with torch.no_grad():
        expected = truth(layer, x)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_compiles_whole(base):
    torch.compiler.reset()
    layer = layer_with(base=base).train()
    x = torch.randn(4, 80)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert layer.lora_magnitude_vector["a"].grad.any()


def test_a_row_of_zeros_stays_zero():
    """Its norm is 0, and 0 / 0 would be NaN."""
    linear = nn.Linear(80, 24, bias=False)
    nn.init.zeros_(linear.weight[3:5].data)
    layer = LoraLinear(linear)
    layer.add_adapter("a", 4, 1.0, peftk.LoraConfig(use_dora=True))
    layer.set_active(["a"])
    layer(torch.randn(4, 80)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.adapter_parameters("a"))


def test_not_beside_merged_adapters():
    model = Net()
    peftk.attach(model, peftk.LoraConfig(target_modules=["q"]), "plain")
    fill(peftk.attach(model, peftk.LoraConfig(target_modules=["q"], use_dora=True), "d"), "d")
    peftk.merge(model, "plain")
    with pytest.raises(ValueError, match="expected DoRA where nothing is merged, got one where plain is merged: "):
        run(model, "net")
    peftk.merge(model, "d")
    assert run(model, "net").isfinite().all()
    peftk.unmerge(model)
    peftk.merge(model, "plain", keep_original=False)
    with pytest.raises(ValueError, match="'d' can't be merged, plain is merged: .*; nothing was merged"):
        peftk.merge(model, "d")


def test_copies_keep_their_own_norms():
    layer = layer_with()
    x = torch.randn(4, 80)
    with torch.no_grad():
        y = layer(x)
        twin = copy.deepcopy(layer)
        twin.lora_magnitude_vector["a"].mul_(2)
        assert torch.equal(layer(x), y) and not torch.allclose(twin(x), y)


CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), (2, 4, 11)),
    "2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=1, bias=False), (2, 4, 7, 5)),
    "3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 4, 3)),
}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_equal_hf(case, dropout, monkeypatch):
    """Outputs, gradients and the merged weight; under dropout HF peft gets our mask."""
    make, shape = CONVOLUTIONS[case]
    model, x = nn.Sequential(make()), torch.randn(shape)
    ours, theirs = twins(model, {"target_modules": ["0"], "use_dora": True, "r": 3, "lora_dropout": dropout})
    other = theirs.base_model.model[0]
    if dropout:
        mask = (torch.rand(shape) < 0.5) * 2.0
        monkeypatch.setattr(lora_conv, "philox_dropout", lambda x, p, seed: x * mask)
        other.lora_dropout["default"].forward = lambda x: x * mask
    weights = None
    for each in (ours.train(), theirs.train()):
        y = each(x)
        weights = torch.linspace(-1, 1, y.numel()).view(y.shape) if weights is None else weights
        (y * weights).sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    expected = {key.replace("vector.weight", "vector"): grad for key, grad in gradients_of_hf(theirs).items()}
    for key, parameter in adapter_tensors(ours, "default").items():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-3, atol=1e-3)
    before = ours.eval()(x)
    peftk.merge(ours)
    other.merge()
    torch.testing.assert_close(ours[0].base_layer.weight, other.base_layer.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["embedding", "convolution"])
def test_rows_and_several_of_other_layers(kind):
    """Each adapter adds its own change of W, and a row gets its own."""
    is_embedding = kind == "embedding"
    model = nn.Sequential(nn.Embedding(11, 8) if is_embedding else nn.Conv1d(4, 6, 3)).eval()
    x = torch.randint(0, 11, (3, 5)) if is_embedding else torch.randn(3, 4, 9)
    for name in ("a", "b"):
        fill(peftk.attach(model, peftk.LoraConfig(target_modules=["0"], r=2, use_dora=True), name), name, seed=ord(name))
    with torch.no_grad():
        alone = {}
        for names in ([], ["a"], ["b"], ["a", "b"]):
            peftk.set_adapter(model, names)
            alone["".join(names)] = model(x)
        torch.testing.assert_close(alone["ab"], alone["a"] + alone["b"] - alone[""], rtol=1e-4, atol=1e-5)
        with peftk.adapters_per_row(model, ["b", "__base__", "a"]):
            y = model(x)
        torch.testing.assert_close(y, torch.stack([alone["b"][0], alone[""][1], alone["a"][2]]), rtol=1e-5, atol=1e-5)
        peftk.merge(model, ["a", "b"])
        torch.testing.assert_close(model(x), alone["ab"], rtol=1e-4, atol=1e-5)
        peftk.unmerge(model)
        peftk.set_adapter(model, "a")
        assert torch.equal(model(x), alone["a"])
