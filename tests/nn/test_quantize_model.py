"""quantize_model on real architectures: what becomes 4-bit, what stays dense, right outputs, and memory."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import peftk
from peftk.nn import NF4Linear


def tiny(name: str) -> tuple[nn.Module, dict]:
    """A model of two layers from its config, and one batch of inputs."""
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(3, 60, (2, 7))
    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name in ("llama", "llama-tied"):
        config = transformers.LlamaConfig(**small, num_key_value_heads=2, tie_word_embeddings=name == "llama-tied")
        return transformers.LlamaForCausalLM(config).eval(), {"input_ids": ids}
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=32)
        return transformers.GPT2LMHeadModel(config).eval(), {"input_ids": ids}
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        return transformers.T5ForConditionalGeneration(config).eval(), {"input_ids": ids, "labels": ids[:, :5].contiguous()}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**small)).eval(), {"input_ids": ids}


def dense_names(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if type(m) is nn.Linear or type(m).__name__ == "Conv1D"}


def quantised_names(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, NF4Linear)}


def put_back(original: nn.Module, model: nn.Module) -> nn.Module:
    """The original with the quantised model's decoded weights: nothing else may differ."""
    for name in quantised_names(model):
        target, w = original.get_submodule(name), model.get_submodule(name).dense_weight()
        target.weight.data.copy_(w.T if type(target).__name__ == "Conv1D" else w)
    return original


def stack(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


T5_WO = {f"{part}.{i}.layer.{j}.DenseReluDense.wo" for part, j in (("encoder.block", 1), ("decoder.block", 2)) for i in (0, 1)}
EXPECTED = {  # what stays dense, and how many layers become 4-bit
    "llama": ({"lm_head"}, 14),
    "llama-tied": ({"lm_head"}, 14),
    "gpt2": ({"lm_head"}, 8),
    "t5": ({"lm_head", *T5_WO}, 28),
    "bert": (set(), 14),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_what_stays_dense_and_right_outputs(name):
    model, inputs = tiny(name)
    original = copy.deepcopy(model)
    others = {key: p for key, p in model.named_parameters() if not key.endswith(".weight") or "norm" in key.lower()}
    assert peftk.quantize_model(model, progress=False) is model
    dense, count = EXPECTED[name]
    assert dense_names(model) == dense and len(quantised_names(model)) == count
    assert all(dict(model.named_parameters())[key] is p for key, p in others.items())  # norms and biases: the very same
    for layer in quantised_names(model):
        w = original.get_submodule(layer).weight
        expected = peftk.quantize_nf4(w.T if type(original.get_submodule(layer)).__name__ == "Conv1D" else w)
        assert torch.equal(model.get_submodule(layer).dense_weight(), expected.dequantize(torch.float32))
    before = original(**inputs).logits
    got, expected = model(**inputs).logits, put_back(original, model)(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str)
def test_t5_in_sixteen_bits_with_wo_in_fp32(dtype):
    """T5 casts its activations to wo.weight.dtype: on a uint8 weight that would be garbage."""
    model, inputs = tiny("t5")
    model.to(dtype)
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    original = copy.deepcopy(model)
    peftk.quantize_model(model, progress=False)
    wo = [m for name, m in model.named_modules() if name.endswith(".wo")]
    assert len(wo) == 4 and all(type(m) is nn.Linear and m.weight.dtype == torch.float32 for m in wo)
    assert model.lm_head.weight.dtype == dtype
    got, expected = model(**inputs), put_back(original, model)(**inputs)
    assert (got.logits - expected.logits).float().norm() < 0.03 * expected.logits.float().norm()
    assert abs(got.loss - expected.loss) < 0.02 * expected.loss


def test_a_part_keeps_its_own_in_fp32():
    """The attribute counts where it stands, on a part of a wrapper too, and only below it."""

    class Part(nn.Module):
        _keep_in_fp32_modules = ["wo"]
        _keep_in_fp32_modules_strict = {"mlp.gate.weight"}

        def __init__(self):
            super().__init__()
            self.wo, self.wi = nn.Linear(64, 4), nn.Linear(64, 4)
            self.mlp = nn.ModuleDict({"gate": nn.Linear(64, 4), "gate_up": nn.Linear(64, 4)})

    model = nn.ModuleDict({"t5": Part(), "wo": nn.Linear(64, 4)})
    peftk.quantize_model(model, progress=False)
    assert dense_names(model) == {"t5.wo", "t5.mlp.gate"} and quantised_names(model) == {"t5.wi", "t5.mlp.gate_up", "wo"}


@pytest.mark.parametrize(
    ("skip", "dense"),
    [
        ((), set()),
        (("b",), {"a.b", "b", "b2.b"}),
        (("a.b",), {"a.b"}),
        (["a"], {"a.b", "a.c"}),
        ({"c"}, {"a.c"}),
        (("b2", "a.c"), {"b2.b", "a.c"}),
        (("a.b.weight",), {"a.b"}),
        (("", "nowhere", "a.", "2"), set()),
    ],
    ids=lambda names: str(sorted(names)),
)
def test_skip(skip, dense):
    layer = lambda: nn.Linear(64, 4)  # noqa: E731
    model = nn.ModuleDict({
        "a": nn.ModuleDict({"b": layer(), "c": layer()}), "b": layer(), "b2": nn.ModuleDict({"b": layer()}),
    })  # fmt: skip
    peftk.quantize_model(model, skip=skip, progress=False)
    assert dense_names(model) == dense and quantised_names(model) == {"a.b", "a.c", "b", "b2.b"} - dense


def test_tied_weights_stay(caplog):
    model, inputs = tiny("llama-tied")
    expected = model(**inputs).logits
    with caplog.at_level(logging.INFO, "peftk"):
        peftk.quantize_model(model, skip=("layers",), progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight and not quantised_names(model)
    assert "lm_head stays dense: its weight is shared" in caplog.text and torch.equal(model(**inputs).logits, expected)
    untied, _ = tiny("llama")
    peftk.quantize_model(untied, skip=("layers",), progress=False)
    assert quantised_names(untied) == {"lm_head"}


def test_a_module_at_two_places_stays_one():
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": stack(shared, nn.ReLU()), "b": stack(nn.Linear(64, 64), shared)})
    peftk.quantize_model(model, progress=False)
    assert isinstance(model["a"][0], NF4Linear) and model["a"][0] is model["b"][1] and not dense_names(model)
    kept = nn.ModuleDict({"a": stack(shared), "head": shared})
    peftk.quantize_model(kept, skip=("head",), progress=False)
    assert kept["a"][0] is kept["head"] is shared


def test_torch_transformer_layers_still_run():
    """nn.TransformerEncoderLayer's fast path and nn.MultiheadAttention read weights behind their layers' backs."""
    model = nn.ModuleDict(
        {"encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), 2), "out": nn.Linear(64, 8)}
    )
    x = torch.randn(2, 5, 64)
    peftk.quantize_model(model.eval(), progress=False)
    assert quantised_names(model) == {"out"}
    with torch.no_grad():
        assert model["out"](model["encoder"](x)).shape == (2, 5, 8)


def test_options_and_mode():
    model = stack(nn.Linear(256, 8, bias=False), nn.Linear(8, 8)).eval()
    model[1].bias.requires_grad_(False)
    bias = model[1].bias
    peftk.quantize_model(model, block_size=128, double_quant=False, progress=False)
    assert all((m.block_size, m.double_quant, m.training) == (128, False, False) for m in model)
    assert model[0].bias is None and model[1].bias is bias and not bias.requires_grad
    again = list(model)
    assert list(peftk.quantize_model(model, progress=False)) == again  # nothing dense is left


def test_meta_model():
    model = stack(nn.Linear(80, 8, device="meta"), nn.Linear(8, 33, device="meta"))
    peftk.quantize_model(model, progress=False)
    assert all(isinstance(m, NF4Linear) and m.weight.is_meta for m in model)
    real = peftk.quantize_model(stack(nn.Linear(80, 8), nn.Linear(8, 33)), progress=False)
    model.load_state_dict(real.state_dict())
    x = torch.randn(3, 80)
    assert torch.equal(model(x), real(x))


def test_nan_names_the_layer():
    model, _ = tiny("llama")
    model.model.layers[1].mlp.down_proj.weight.data[5, 3] = float("nan")
    with pytest.raises(
        ValueError, match=r"model.layers.1.mlp.down_proj.weight: expected finite values, got nan at index \(5, 3\)"
    ):
        peftk.quantize_model(model, progress=False)
    assert type(model.model.layers[1].mlp.down_proj) is nn.Linear and len(quantised_names(model)) == 13


def test_refuses():
    with pytest.raises(TypeError, match="model: expected a module that holds linear layers, got a linear layer"):
        peftk.quantize_model(nn.Linear(64, 4), progress=False)
    with pytest.raises(TypeError, match="skip: expected a sequence of names, got the string 'lm_head'"):
        peftk.quantize_model(stack(nn.Linear(64, 4)), skip="lm_head", progress=False)
    with pytest.raises(ValueError, match="block_size: expected one of"):
        peftk.quantize_model(stack(nn.Linear(64, 4)), block_size=48, progress=False)


def test_progress_bar(capsys):
    pytest.importorskip("tqdm")
    peftk.quantize_model(stack(nn.Linear(64, 4), nn.Linear(4, 4)))
    assert "quantising to NF4" in (shown := capsys.readouterr().err) and "2/2" in shown
    peftk.quantize_model(stack(nn.Linear(64, 4)), progress=False)
    assert capsys.readouterr().err == ""


def test_outputs_stay_near_the_original():
    """4 bits cost a few percent, not more."""
    model = stack(nn.Linear(256, 128))
    x = torch.randn(16, 256)
    expected = model(x)
    peftk.quantize_model(model, progress=False)
    assert 0.02 < (model(x) - expected).norm() / expected.norm() < 0.12


MEMORY = """
import gc, torch
from torch import nn
import peftk

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

torch.set_num_threads(2)
class Conv1D(nn.Module):  # transformers' layer: quantising it needs the transposed weight
    def __init__(self, n, k):
        super().__init__()
        self.nf, self.weight, self.bias = n, nn.Parameter(torch.zeros(k, n)), nn.Parameter(torch.zeros(n))

with torch.device("meta"):
    model = nn.Sequential(*[nn.Linear(SIZE, SIZE) for _ in range(COUNT - 1)])
model.to_empty(device="cpu").append(Conv1D(SIZE, SIZE))
for p in model.parameters():
    p.data.fill_(0.5)  # touches every page
warm = nn.Sequential(nn.Linear(64, 64))
peftk.quantize_model(warm, progress=False)  # loads what the first call loads
gc.collect()
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again at the resident size
peftk.quantize_model(model, progress=False)
print(before, status("VmHWM"), status("VmRSS"), sum(1 for m in model if type(m) is peftk.nn.NF4Linear))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc/self")
@pytest.mark.parametrize(("size", "count"), [(4096, 9), pytest.param(1024, 36, marks=pytest.mark.full)], ids=["67 MB", "4 MB"])
def test_peak_memory(size, count):
    """A process of its own, with ``count`` fp32 layers of size^2, the last a Conv1D. Compared: the process' high-water mark of
    resident memory during quantize_model with its resident memory just before, which the model is part of: at most one layer's
    fp32 bytes + 64 MB more. Afterwards at least 80 % of the model's bytes are given back to the system."""
    program = MEMORY.replace("SIZE", str(size)).replace("COUNT", str(count))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, peak, after, quantised = map(int, done.stdout.split())
    layer, model = 4 * size * size, 4 * size * size * count
    assert quantised == count and before > model
    assert peak - before <= layer + (64 << 20), f"{(peak - before) / 1e6:.0f} MB above the model"
    assert before - after >= 0.8 * model, f"{(before - after) / 1e6:.0f} of {model / 1e6:.0f} MB given back"
