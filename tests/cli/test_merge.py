"""peftk merge against peftk.merge in memory: the same tensors, bit for bit, from files that are read in pieces."""

from __future__ import annotations

import csv
import json

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import peftk
from peftk.checkpoint import adapter_tensors
from peftk.cli import main
from peftk.streaming import values as values_module

LINEAR = {"r": 4, "target_modules": "all-linear"}
DORA = {
    **LINEAR,
    "use_dora": True,
    "use_rslora": True,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"v_proj": 3},
    "bias": "all",
}
EXPERTS = {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}
CASES = {
    "lora": ("llama", peftk.LoraConfig(**LINEAR)),
    "dora": ("llama", peftk.LoraConfig(**DORA)),
    "vocabulary": ("llama", peftk.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"])),
    "adalora": ("llama", peftk.AdaLoraConfig(init_r=4, target_r=2, total_step=10)),
    "conv1d": ("gpt2", peftk.LoraConfig(r=4, target_modules=["c_attn", "c_fc", "wte"], use_dora=True)),
    "experts": ("gpt_oss", peftk.LoraConfig(**EXPERTS)),
}
MODELS = {"llama": tiny_models.llama, "gpt2": tiny_models.gpt2, "gpt_oss": tiny_models.gpt_oss}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that small weights are many pieces."""
    monkeypatch.setattr(values_module, "CHUNK", 1 << 8)


def made(tmp_path, kind: str, config, dtype: torch.dtype = torch.float32, base_4bit: bool = False, **changes):
    """(the model with its adapter, both on disk): folders "base" and "adapter"."""
    torch.manual_seed(0)
    model = MODELS[kind](**changes).to(dtype).eval()
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    if base_4bit:
        (tmp_path / "base").rename(tmp_path / "dense")
        assert main(["quantize", "--model", str(tmp_path / "dense"), "--out", str(tmp_path / "base")]) == 0
        from peftk.integrations.transformers import from_bitsandbytes

        model = from_bitsandbytes(tmp_path / "base", type(model), dtype=dtype)
    tiny_models.fill(peftk.attach(model, config))
    peftk.save_adapter(model, tmp_path / "adapter")
    return model


def merge(tmp_path, *flags: str) -> int:
    folders = ["--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    return main(["merge", *folders, *flags])


def files(folder) -> dict[str, torch.Tensor]:
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], absent: set[str] = frozenset()) -> None:
    assert set(expected) - set(found) == absent
    for key in found:
        assert torch.equal(found[key], expected[key]), key


@pytest.mark.parametrize("case", CASES)
def test_the_same_as_in_memory(tmp_path, case):
    kind, config = CASES[case]
    changes = {"tie_word_embeddings": False} if case == "vocabulary" else {}
    model = made(tmp_path, kind, config, **changes)
    assert merge(tmp_path) == 0
    expected = peftk.detach(peftk.merge(model)).state_dict()
    found = files(tmp_path / "out")
    same(found, expected)
    assert not any(key.startswith("base_model") for key in found)


def test_one_rounding_to_16_bits(tmp_path):
    model = made(tmp_path, "llama", peftk.LoraConfig(**DORA))
    assert merge(tmp_path, "--to", "bf16") == 0
    merged = peftk.detach(peftk.merge(model)).state_dict()
    same(files(tmp_path / "out"), {key: tensor.bfloat16() for key, tensor in merged.items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_base_in_4_bits_stays_so(tmp_path, capsys):
    """peftk.merge in memory quantises the same sum; the error told is that of what is stored."""
    model = made(tmp_path, "llama", peftk.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]), base_4bit=True)
    before = peftk.merge(model, dry_run=True)
    assert merge(tmp_path) == 0
    same(files(tmp_path / "out"), peftk.detach(peftk.merge(model)).state_dict())
    with open(tmp_path / "out" / "merge_report.csv", newline="") as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    assert set(rows) == {error.path for error in before.weights}
    for path, row in rows.items():
        assert float(row["relative"]) == pytest.approx(before[path].relative, rel=1e-4)
        assert float(row["of_adapter"]) == pytest.approx(before[path].of_adapters, rel=1e-3)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["load_in_4bit"]


def test_a_base_in_4_bits_becomes_dense(tmp_path):
    from transformers import AutoModelForCausalLM

    model = made(tmp_path, "llama", peftk.LoraConfig(r=4, target_modules=["q_proj"]), base_4bit=True)
    merged = {}
    for path, layer in model.named_modules():
        if isinstance(layer, peftk.nn.NF4Linear):
            merged[f"{path.removesuffix('.base_layer')}.weight"] = layer.dense_weight()
    for path, layer in model.named_modules():
        if hasattr(layer, "merged_weight"):
            merged[f"{path}.weight"] = layer.merged_weight(["default"])
    assert merge(tmp_path, "--to", "bf16") == 0
    found = files(tmp_path / "out")
    assert len(merged) == 14
    for key, w in merged.items():
        assert torch.equal(found[key], w.bfloat16()), key
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert dense.dtype == torch.bfloat16 and not hasattr(dense.config, "quantization_config")


def test_a_dense_base_into_4_bits(tmp_path):
    """The fp32 sum is quantised, not a rounded one; what quantising the base alone costs stands beside."""
    model = made(tmp_path, "llama", peftk.LoraConfig(**LINEAR), torch.bfloat16)
    assert merge(tmp_path, "--to", "nf4", "--skip", "up_proj", "--block-size", "128") == 0
    found = files(tmp_path / "out")
    with open(tmp_path / "out" / "merge_report.csv", newline="") as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    layers = {path: layer for path, layer in model.named_modules() if hasattr(layer, "merged_weight")}
    assert set(rows) == set(layers) and len(rows) == 14
    for path, layer in layers.items():
        exact, base = layer.merged_weight(["default"]), layer.read_weight()
        if path.endswith("up_proj"):
            assert torch.equal(found[f"{path}.weight"], exact.bfloat16()) and rows[path]["base"] == ""
            continue
        w4 = peftk.quantize_nf4(exact, 128)
        assert torch.equal(found[f"{path}.weight"], w4.state_dict("")["weight"])
        off = peftk.quantize_nf4(base, 128).dequantize(torch.float32) - base.float()
        assert float(rows[path]["base"]) == pytest.approx((off.norm() / base.float().norm()).item(), rel=1e-4)
    skipped = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert sorted(skipped) == ["lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]


def test_a_tied_head_gets_a_weight_of_its_own(tmp_path):
    from transformers import AutoModelForCausalLM

    config = peftk.LoraConfig(r=4, target_modules=["lm_head", "q_proj"])
    model = made(tmp_path, "llama", config, tie_word_embeddings=True)
    ids = torch.arange(1, 20)[None]
    expected = model(input_ids=ids).logits
    assert merge(tmp_path) == 0
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert read.config.tie_word_embeddings is False
    assert not torch.equal(read.lm_head.weight, read.model.embed_tokens.weight)
    torch.testing.assert_close(read(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_merged_says_why(tmp_path, capsys):
    model = made(tmp_path, "llama", peftk.PromptTuningConfig(num_virtual_tokens=4))
    del model
    assert merge(tmp_path) == 2
    assert "got PROMPT_TUNING, which adds to the inputs or the keys and values: no weight can hold it" in capsys.readouterr().err
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "VERA"}))
    assert merge(tmp_path) == 2
    assert "adapter_config.json: peft_type: expected one of" in capsys.readouterr().err
    assert (
        main(["merge", "--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "no"), "--out", str(tmp_path / "out")]) == 2
    )
    assert "no: no such folder" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_is_refused(tmp_path, capsys):
    made(tmp_path, "llama", peftk.LoraConfig(r=4, target_modules=["q_proj"]))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)
    assert merge(tmp_path) == 2
    assert "expected the adapter's tensors, got missing keys: base_model.model" in capsys.readouterr().err
    assert merge(tmp_path, "--block-size", "128") == 2
    assert "are for --to nf4 of a dense base" in capsys.readouterr().err


def test_what_leaves_fp16s_range_is_told(tmp_path, capsys):
    model = made(tmp_path, "llama", peftk.LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for tensor in adapter_tensors(model, "default").values():
            tensor.mul_(1e4)
    peftk.save_adapter(model, tmp_path / "adapter")
    assert merge(tmp_path, "--to", "fp16") == 2
    assert "q_proj.weight: expected values in torch.float16's range" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
