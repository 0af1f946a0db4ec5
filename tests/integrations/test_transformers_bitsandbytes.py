"""Folders that bitsandbytes and peftk quantised, each read by the other; bytes are compared, and outputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peftk

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from saved_models import IS_4, assert_same_state, auto_class, inputs, saved  # noqa: E402

from peftk.integrations.transformers import NF4Config, from_bitsandbytes, save_as_bitsandbytes  # noqa: E402


def theirs(folder: Path, out: Path, name: str = "llama", **facts) -> torch.nn.Module:
    """A model that bitsandbytes quantised, and its folder ``out``."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **facts)
    model = auto_class(name).from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config, device_map="cpu")
    model.save_pretrained(out)
    return model


def stored(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.reshape(-1) if ".weight" in key else value for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("llama", {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
        ("llama-tied", {"bnb_4bit_quant_type": "nf4"}),
        ("gpt2", {}),  # FP4 is bitsandbytes' default
        ("t5", {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}),
        ("llama", {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16, "llm_int8_skip_modules": ["up_proj"]}),
    ],
    ids=["nf4-nested", "nf4-tied", "fp4-conv1d", "fp4-nested-t5", "stored-as-bf16"],
)
def test_reads_theirs(tmp_path: Path, name: str, facts: dict):
    """Every stored byte as it was; the outputs within bf16's rounding of theirs, which decodes to the compute dtype."""
    theirs(saved(tmp_path / "dense", name, torch.bfloat16), tmp_path / "four", name, **facts)
    ours = from_bitsandbytes(tmp_path / "four", auto_class(name), dtype=torch.bfloat16)
    from safetensors.torch import load_file

    file, ours_state = load_file(tmp_path / "four" / "model.safetensors"), ours.state_dict()
    for key, value in file.items():
        if value.dtype == torch.bfloat16 and value.shape[-1] == 1 and ".weight" in key:
            value = value.view(torch.uint8)
        assert torch.equal(ours_state[key].reshape(-1), value.reshape(-1)), key
    layers = [module for module in ours.modules() if isinstance(module, peftk.nn.NF4Linear)]
    assert layers and {layer.quant_type for layer in layers} == {facts.get("bnb_4bit_quant_type", "fp4")}
    assert {layer.double_quant for layer in layers} == {facts.get("bnb_4bit_use_double_quant", False)}
    ours.save_pretrained(tmp_path / "again")
    again = auto_class(name).from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert_same_state(ours, again)
    assert torch.equal(ours(**inputs(name)).logits, again(**inputs(name)).logits)


def test_outputs_are_theirs(tmp_path: Path):
    facts = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    model = theirs(
        saved(tmp_path / "dense", "llama-64"), tmp_path / "four", **facts
    ).train()  # in eval mode it would repack its weights
    ours = from_bitsandbytes(tmp_path / "four", dtype=torch.bfloat16)
    y, expected = ours(**inputs()).logits.float(), model(**inputs()).logits.float()
    assert (y - expected).norm() < 0.02 * expected.norm()


def test_needs_no_bitsandbytes(tmp_path: Path):
    theirs(saved(tmp_path / "dense"), tmp_path / "four", bnb_4bit_quant_type="nf4")
    code = f"""
import sys
sys.modules["bitsandbytes"] = None  # importing it fails
from peftk.integrations.transformers import from_bitsandbytes
print(type(from_bitsandbytes({str(tmp_path / "four")!r}).model.layers[0].mlp.up_proj).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["NF4Linear"], done.stderr


@pytest.mark.parametrize(("name", "double_quant", "quant_type"), [("llama-64", True, "nf4"), ("gpt2", False, "fp4")])
def test_they_read_ours(tmp_path: Path, name: str, double_quant: bool, quant_type: str):
    config = NF4Config(double_quant=double_quant, quant_type=quant_type, compute_dtype=torch.bfloat16)
    folder = saved(tmp_path / "dense", name, torch.bfloat16)
    ours = auto_class(name).from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    save_as_bitsandbytes(ours, tmp_path / "four")
    model = auto_class(name).from_pretrained(tmp_path / "four", dtype=torch.bfloat16, device_map="cpu").train()
    names = {type(module).__name__ for module in model.modules()}
    assert "Linear4bit" in names and "NF4Linear" not in names
    mine, other = stored(ours), stored(model)
    assert sorted(mine) == sorted(other)
    assert [key for key in mine if not torch.equal(mine[key], other[key])] == []
    if name == "llama-64":
        y, expected = ours(**inputs()).logits.float(), model(**inputs()).logits.float()
        assert (y - expected).norm() < 0.02 * expected.norm()
    assert_same_state(from_bitsandbytes(tmp_path / "four", dtype=torch.bfloat16), ours)


def test_refusals(tmp_path: Path):
    saved(tmp_path / "dense")
    with pytest.raises(ValueError, match="folder: expected one with bitsandbytes' 4-bit weights, got .*dense, quantised by None"):
        from_bitsandbytes(tmp_path / "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"model: expected NF4Linear layers of one kind, got \[\]"):
        save_as_bitsandbytes(model, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=NF4Config())
    peftk.attach(model, peftk.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"model: expected one from from_pretrained with an NF4Config, without adapters"):
        save_as_bitsandbytes(model, tmp_path / "out")


@pytest.mark.skipif(not IS_4, reason="transformers 5 doesn't cast codes")
def test_version_4_would_cast_codes(tmp_path: Path):
    theirs(saved(tmp_path / "dense"), tmp_path / "four", bnb_4bit_quant_storage=torch.bfloat16)
    with pytest.raises(ValueError, match="dtype: expected bfloat16 for codes that are stored as bfloat16, got torch.float32"):
        from_bitsandbytes(tmp_path / "four", dtype=torch.float32)
