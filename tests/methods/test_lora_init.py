"""How factors start: against HF peft, against what each decomposition promises, and what is saved after."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from numerics import row_scaled
from tiny_models import MODELS, Net, fill, hf_model, llama, run
from torch import nn

import peftk
from peftk.checkpoint import CONFIG
from peftk.methods.attach import wrappers
from peftk.methods.lora_init import draw, start_of

TAKEN = ["pissa", "pissa_niter_4", "olora"]


def net(base: str = "dense", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = Net().to(dtype).eval().requires_grad_(False)
    return peftk.quantize_model(model, progress=False) if base == "nf4" else model


def error(w: torch.Tensor, other: torch.Tensor) -> float:
    return ((w - other).norm() / w.norm()).item()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("kind", "model"), [("pissa", "llama"), ("olora", "llama"), ("pissa", "gpt2")])
def test_starts_equal_hf(kind, rslora, model):
    targets = ["q_proj", "down_proj"] if model == "llama" else ["c_attn"]
    fields = {"r": 4, "lora_alpha": 6, "init_lora_weights": kind, "use_rslora": rslora, "target_modules": targets}
    ours = MODELS[model]()
    theirs = hf_model(ours, {**fields, "fan_in_fan_out": model == "gpt2"})
    peftk.attach(ours, peftk.LoraConfig(**fields))
    for path, layer in wrappers(ours):
        other = theirs.base_model.model.get_submodule(path)
        mine = layer.lora_B["default"] @ layer.lora_A["default"]
        torch.testing.assert_close(mine, other.lora_B["default"].weight @ other.lora_A["default"].weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.base_layer.weight, other.base_layer.weight, rtol=1e-4, atol=1e-5)
        gram = layer.lora_A["default"] @ layer.lora_A["default"].T
        torch.testing.assert_close(gram, other.lora_A["default"].weight @ other.lora_A["default"].weight.T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", TAKEN)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_starts_as_it_was(kind, dora, dtype):
    model = net(dtype=dtype)
    y = run(model, "net")
    weights = {path: module.weight.clone() for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    peftk.attach(model, peftk.LoraConfig(target_modules=["q", "v"], r=4, init_lora_weights=kind, use_dora=dora, use_rslora=True))
    tight = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(run(model, "net"), y, **tight)
    for path, layer in wrappers(model):
        w, rest = weights[path].float(), layer.base_layer.dense_weight().float()
        assert error(w, rest) > 0.1
        assert error(w, layer.read_weight()) < (1e-6 if dtype == torch.float32 else 3e-3)
        if kind == "pissa":
            assert torch.linalg.svdvals(rest)[0] < torch.linalg.svdvals(w)[4] * 1.01
    with peftk.disable_adapters(model):
        torch.testing.assert_close(run(model, "net"), y, **tight)
    peftk.detach(model)
    torch.testing.assert_close(run(model, "net"), y, **tight)
    for path, w in weights.items():
        torch.testing.assert_close(model.get_submodule(path).weight, w, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=1e-2)


def test_pissas_factors_are_the_papers():
    w, s = row_scaled(24, 80), 1.5
    start = start_of("w", w, 4, s, peftk.LoraConfig(init_lora_weights="pissa"))
    u, values, vt = torch.linalg.svd(w.double(), full_matrices=False)
    best = (u[:, :4] * values[:4]) @ vt[:4]
    torch.testing.assert_close(s * start.B.double() @ start.A.double(), best, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((start.B.T @ start.B), (start.A @ start.A.T), rtol=1e-4, atol=1e-3)  # both have sqrt(S / s)
    fast = start_of("w", w, 4, s, peftk.LoraConfig(init_lora_weights="pissa_niter_8"))
    assert error(best.float(), s * fast.B @ fast.A) < 1e-4


@pytest.mark.parametrize("dora", [False, True])
def test_pissa_on_4_bits_loses_less(dora):
    """The rest is quantised again, and W as it was decoded is met better than NF4 meets a fresh W."""
    model = net("nf4")
    y, w = run(model, "net"), model.layers[0]["q"].dense_weight()
    peftk.attach(model, peftk.LoraConfig(target_modules=["q"], r=8, init_lora_weights="pissa", use_dora=dora))
    layer = model.layers[0]["q"]
    plain = error(w - layer.taken_B @ layer.taken_A, layer.base_layer.dense_weight())
    assert 0.02 < plain < 0.12  # quantised again, by peftk's NF4
    assert error(w, layer.read_weight()) < plain
    assert torch.equal(
        layer.base_layer.w4.packed.flatten(), peftk.quantize_nf4(w - layer.taken_B @ layer.taken_A).packed.flatten()
    )
    torch.testing.assert_close(run(model, "net"), y, rtol=0.1, atol=0.2)
    peftk.detach(model)
    torch.testing.assert_close(run(model, "net"), y, rtol=0.1, atol=0.3)


@pytest.mark.parametrize("iterations", [1, 5])
def test_loftq_reduces_the_error(iterations):
    model = net()
    weights = {path: module.weight.clone() for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    y = run(model, "net")
    config = peftk.LoraConfig(
        r=8, target_modules=["q", "v"], init_lora_weights="loftq", loftq_config={"loftq_iter": iterations}, use_rslora=True
    )
    peftk.attach(model, config)
    for path, layer in wrappers(model):
        w = weights[path]
        assert isinstance(layer.base_layer, peftk.nn.NF4Linear) and layer.base_layer.double_quant
        plain = error(w, peftk.quantize_nf4(w).dequantize())
        assert error(w, layer.read_weight()) < 0.85 * plain
    near = (run(model, "net") - y).norm()
    assert near < (run(net("nf4"), "net") - y).norm()
    with peftk.disable_adapters(model):
        torch.testing.assert_close((run(model, "net") - y).norm(), near, rtol=1e-3, atol=1e-3)
    assert all(p.grad is None for p in model.parameters())
    peftk.detach(model)
    assert isinstance(model.layers[0]["q"], peftk.nn.NF4Linear)


def test_more_iterations_of_loftq_are_never_worse():
    w, errors = row_scaled(64, 128), []
    for count in (1, 2, 5, 10):
        config = peftk.LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_iter": count})
        start = start_of("w", w, 16, 0.5, config)
        errors.append(error(w, start.w4.dequantize() + 0.5 * start.B @ start.A))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


def test_loftq_refuses_with_the_numbers():
    w = peftk.quantize_nf4(row_scaled(16, 64), double_quant=False).dequantize()
    config = peftk.LoraConfig(init_lora_weights="loftq", loftq_config={"double_quant": False})
    with pytest.raises(ValueError, match="w: loftq: expected an error below plain quantisation's, got, .*, 0, 0$"):
        start_of("w", w, 4, 1.0, config)


def test_orthogonal():
    A, B = draw("orthogonal", 48, 80, 8)
    assert A.shape == (8, 80) and B.shape == (48, 8) and A.any() and B.any()
    torch.testing.assert_close(B @ A, torch.zeros(48, 80), rtol=0, atol=1e-5)
    assert abs(A.std() * 10 * 2**0.5 - 1) < 0.2  # HF peft's scale: rows of an orthogonal matrix, a normal one, 1/10
    hf = hf_model(nn.Sequential(nn.Linear(80, 48)), {"target_modules": ["0"], "init_lora_weights": "orthogonal"})
    torch.testing.assert_close(A.std(), hf.base_model.model[0].lora_A["default"].weight.std(), rtol=0.2, atol=0)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", TAKEN)
def test_beside_others_and_through_merging(kind, dora):
    """A second adapter stands on W, not on the rest; merged in any order the outputs stay, and unmerged the bytes come back."""
    model = net()
    fill(peftk.attach(model, peftk.LoraConfig(target_modules=["q"]), "plain"), "plain")
    y_plain = run(model, "net")
    with peftk.disable_adapters(model):
        y = run(model, "net")
    peftk.attach(model, peftk.LoraConfig(target_modules=["q", "v"], r=4, init_lora_weights=kind, use_dora=dora), "start")
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)  # noqa: E731
    close(run(model, "net"), y)
    peftk.set_adapter(model, "plain")
    close(run(model, "net"), y_plain)
    peftk.set_adapter(model, ["start", "plain"])
    close(run(model, "net"), y_plain)
    with torch.no_grad():
        for _, layer in wrappers(model):
            layer.lora_B["start"].add_(0.1 * torch.randn_like(layer.lora_B["start"]))
    both, stored = run(model, "net"), model.layers[0]["q"].take_snapshot()
    assert not torch.allclose(both, y_plain, atol=1e-2)
    with peftk.adapters_per_row(model, ["__base__", "plain", "start"]):
        rows = run(model, "net")
    close(rows[:2], torch.stack([y[0], y_plain[1]]))
    peftk.set_adapter(model, "start")
    alone = run(model, "net")
    close(rows[2], alone[2])
    peftk.merge(model, "plain")
    if not dora:
        peftk.set_adapter(model, ["start", "plain"])
        close(run(model, "net"), both)
    peftk.merge(model, "start")
    close(run(model, "net"), both)
    peftk.unmerge(model)
    assert torch.equal(model.layers[0]["q"].take_snapshot(), stored)
    close(run(model, "net"), both if not dora else alone)
    peftk.merge(model, "plain")
    peftk.delete_adapter(model, "start")
    close(run(model, "net"), y_plain)
    peftk.unmerge(model)
    with peftk.disable_adapters(model):
        close(run(model, "net"), y)


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora", "use_dora": True},
        {
            "init_lora_weights": "pissa_niter_4", "use_rslora": True,
            "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5},
        },
    ],
    ids=str,
)  # fmt: skip
def test_saved_as_a_difference_that_hf_reads(fields, tmp_path):
    """On the original weights, by HF peft and by peftk; HF peft refuses rsLoRA with patterns here."""
    peft = pytest.importorskip("peft")
    base = llama().eval()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    ours = peftk.attach(base, peftk.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], **fields))
    with torch.no_grad():
        for parameter in peftk.trainable_parameters(ours):
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = run(ours, "llama")
    peftk.save_adapter(ours, tmp_path / "a")
    written = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert written["init_lora_weights"] is True and written["r"] == 8
    fresh = llama().eval()
    fresh.load_state_dict(state)
    theirs = llama().eval()
    theirs.load_state_dict(state)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a")
        torch.testing.assert_close(run(theirs, "llama"), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(run(peftk.load_adapter(fresh, tmp_path / "a"), "llama"), expected, rtol=1e-3, atol=1e-4)
        peftk.save_adapter(fresh, tmp_path / "b")
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["r"] == 8  # a difference is saved as it is


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_reads_hf_pefts_unconverted_file(kind, tmp_path):
    """HF peft takes the start out of the weight again when it reads such a file; so does peftk."""
    peft = pytest.importorskip("peft")
    base = llama().eval()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    theirs = hf_model(base, {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": kind}).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = run(theirs, "llama")
    theirs.save_pretrained(tmp_path / "a")
    fresh = llama().eval()
    fresh.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(run(peftk.load_adapter(fresh, tmp_path / "a"), "llama"), expected, rtol=1e-3, atol=1e-4)
    peftk.save_adapter(fresh, tmp_path / "b")
    again = llama().eval()
    again.load_state_dict(state)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(
            run(peft.PeftModel.from_pretrained(again, tmp_path / "b"), "llama"), expected, rtol=1e-3, atol=1e-4
        )
