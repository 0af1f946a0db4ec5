"""from_pretrained with an NF4Config against ``peftk.quantize_model``, bit for bit; runs with transformers 4 and 5."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import peftk

transformers = pytest.importorskip("transformers")

from saved_models import IS_4, MODELS, assert_same_state, auto_class, inputs, saved  # noqa: E402

from peftk.integrations.transformers import NF4Config, layers  # noqa: E402


def load(folder: Path, name: str = "llama", dtype: torch.dtype | str = "auto", config: NF4Config | None = None, **kwargs):
    quantization = {} if config is None else {"quantization_config": config}  # transformers takes None for "not quantised"
    return auto_class(name).from_pretrained(folder, dtype=dtype, **quantization, **kwargs)


@pytest.mark.parametrize(
    ("name", "stored", "wanted"),
    [
        ("llama", torch.float32, torch.float32),
        ("llama-tied", torch.bfloat16, torch.bfloat16),
        ("gpt2", torch.float32, torch.bfloat16),
        ("t5", torch.float16, torch.float16),
    ],
)
def test_loads_what_quantize_model_makes(tmp_path: Path, name: str, stored: torch.dtype, wanted: torch.dtype):
    """Conv1D is transposed, T5 keeps its fp32 layers, tied heads stay dense and tied."""
    folder = saved(tmp_path, name, stored)
    ours = load(folder, name, wanted, NF4Config())
    expected = peftk.quantize_model(load(folder, name, wanted), progress=False)
    assert_same_state(ours, expected)
    assert any(isinstance(module, peftk.nn.NF4Linear) for module in ours.modules())
    assert not any(isinstance(module, layers.PendingLinear) for module in ours.modules())
    assert torch.equal(ours(**inputs(name)).logits, expected.eval()(**inputs(name)).logits)
    if name == "llama-tied":
        assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert not any(p.requires_grad for p in ours.model.layers[0].mlp.parameters()) if "llama" in name else True


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str)
def test_shards_and_device_maps(tmp_path: Path, device_map):
    folder = saved(tmp_path, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    ours = load(folder, config=NF4Config(), device_map=device_map)
    assert_same_state(ours, peftk.quantize_model(load(folder), progress=False))
    ours(**inputs())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "t5"])
def test_round_trip_bit_for_bit(tmp_path: Path, name: str):
    """Twice, since a model that was read in 4 bits takes another way through transformers' writer."""
    config = NF4Config(block_size=128, double_quant=name != "gpt2", quant_type="fp4" if name == "t5" else "nf4")
    first = load(saved(tmp_path / "dense", name), name, torch.bfloat16, config)
    first.save_pretrained(tmp_path / "one", max_shard_size="8KB")
    second = load(tmp_path / "one", name)
    second.save_pretrained(tmp_path / "two")
    third = load(tmp_path / "two", name)
    assert_same_state(first, second)
    assert_same_state(first, third)
    assert torch.equal(first(**inputs(name)).logits, third(**inputs(name)).logits)
    assert third.config.quantization_config.to_dict() == config.to_dict()
    assert first.dtype == third.dtype == torch.bfloat16


def test_modules_to_not_convert(tmp_path: Path):
    config = NF4Config(modules_to_not_convert=["v_proj", "model.layers.1", "lm_head"], compute_dtype="bfloat16")
    model = load(saved(tmp_path / "dense"), config=config)
    model.save_pretrained(tmp_path / "four")
    for loaded in (model, load(tmp_path / "four")):
        paths = {path for path, module in loaded.named_modules() if isinstance(module, peftk.nn.NF4Linear)}
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        assert paths == {f"model.layers.0.{name}" for name in names}
        assert loaded.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert_same_state(model, loaded)
    everything = load(tmp_path / "dense", config=NF4Config(modules_to_not_convert=[]))
    assert isinstance(everything.lm_head, peftk.nn.NF4Linear)


def test_a_new_head_is_drawn_and_quantised(tmp_path: Path):
    """Weights that no file has are initialised, whether their layer stays dense or not."""
    saved(tmp_path)
    config = NF4Config(modules_to_not_convert=[])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config, num_labels=3)
    head = model.score.dense_weight()
    assert isinstance(model.score, peftk.nn.NF4Linear) and head.shape == (3, 32)
    assert 0.05 < head.std() < 0.5, "drawn with the config's range, 0.2"


def test_no_dense_model_in_memory(tmp_path: Path):
    """Each weight is quantised between its own read and the next one's. Anonymous memory, seen at each weight; the pages of the
    file that is mapped don't count. The dense model has 71 MB, in 4 bits 9 MB."""
    sizes = {"hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 64}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path)
    code = f"""
import torch, transformers
from peftk.integrations.transformers import NF4Config, layers
def megabytes():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024
seen, take = [], layers.PendingLinear.take
def measured(self, tensor, name):
    seen.append(megabytes())
    return take(self, tensor, name)
layers.PendingLinear.take = measured
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, dtype=torch.float32, quantization_config=NF4Config())
print(len(seen), max(seen) - seen[0], megabytes() - seen[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, peak, after = map(float, done.stdout.split())
    assert count == 56
    assert peak < 20 and after < 20, f"{peak:.0f} MB while loading, {after:.0f} MB after"


def test_dequantize(tmp_path: Path):
    for name in ("llama", "gpt2"):
        model = load(saved(tmp_path / name, name), name, torch.float32, NF4Config())
        expected = model(**inputs(name)).logits
        dense = model.dequantize()
        assert not any(isinstance(module, peftk.nn.NF4Linear) for module in dense.modules())
        assert torch.allclose(dense(**inputs(name)).logits, expected, atol=1e-4)
        dense.save_pretrained(tmp_path / f"{name}-dense")
        assert torch.equal(load(tmp_path / f"{name}-dense", name)(**inputs(name)).logits, dense(**inputs(name)).logits)


def test_copies_and_memory(tmp_path: Path):
    """No reference cycle: the model goes with its last name. Copies have their own methods."""
    model = load(saved(tmp_path), config=NF4Config())
    twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (twin, again):
        assert_same_state(model, other)
        peftk.attach(other, peftk.LoraConfig(r=2, target_modules=["q_proj"]))
        assert other.hf_quantizer.is_qat_trainable and not model.hf_quantizer.is_qat_trainable
        other.save_pretrained(tmp_path / "adapter")
        assert (tmp_path / "adapter" / "adapter_config.json").exists()
        assert type(other) is type(model) and isinstance(other, transformers.LlamaForCausalLM)
    assert len(model(**inputs(), output_hidden_states=True).hidden_states) == 3
    gone = weakref.ref(model)
    del model
    assert gone() is None


# ---- refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 100}, "block_size: expected one of"),
        ({"double_quant": 1}, "double_quant: expected a bool, got 1"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert: expected a list of names or None, got 'lm_head'"),
        ({"modules_to_not_convert": 4}, "modules_to_not_convert: expected a list of names or None, got 4"),
        ({"compute_dtype": torch.int8}, "compute_dtype: expected one of torch.float32, "),
        ({"compute_dtype": "bf16"}, "compute_dtype: expected one of torch.float32, .* got 'bf16'"),
        ({"quant_type": "int4"}, "quant_type: expected one of"),
        ({"quant_method": "gptq"}, "quant_method: expected 'peftk_nf4', got 'gptq'"),
    ],
)
def test_config_refuses(arguments: dict, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        NF4Config(**arguments)


def test_weights_that_are_not_finite(tmp_path: Path):
    model = MODELS["llama"]()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path, config=NF4Config())


def test_a_damaged_file(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    load(saved(tmp_path / "dense"), config=NF4Config()).save_pretrained(tmp_path / "four")
    path = tmp_path / "four" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[f"{name}.absmax"] = tensors[f"{name}.absmax"][:-1].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(f"{name}.absmax: expected 24 values of torch.uint8, got (23,)")):
        load(tmp_path / "four")


def test_other_refusals(tmp_path: Path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="device_map: expected devices, got 'disk'"):
        load(tmp_path, config=NF4Config(), device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=str(tmp_path / "off"))
    with pytest.raises(ValueError, match="expected one with linear layers to quantise, got LlamaForCausalLM with none left"):
        load(tmp_path, config=NF4Config(modules_to_not_convert=["model", "lm_head"]))


@pytest.mark.skipif(IS_4, reason="transformers 4 has an expert's matrices in linear layers of their own")
def test_fused_experts(tmp_path: Path):
    from tiny_models import mixtral

    mixtral().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected it to name model\.layers\.0\.mlp\.experts, whose fused experts"):
        load(tmp_path, config=NF4Config())
    model = load(tmp_path, config=NF4Config(modules_to_not_convert=["experts", "lm_head"]))
    peftk.quantize_model(model, progress=False)
    assert isinstance(model.model.layers[0].mlp.experts, peftk.nn.Experts)


def test_without_the_import_it_fails_aloud(tmp_path: Path):
    """transformers finds a quantiser only once peftk.integrations.transformers was imported; before, nothing wrong is loaded."""
    load(saved(tmp_path / "dense"), config=NF4Config()).save_pretrained(tmp_path / "four")
    assert json.loads((tmp_path / "four" / "config.json").read_text())["quantization_config"]["quant_method"] == "peftk_nf4"
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'four')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "peftk_nf4" in done.stderr
    code = f"import peftk.integrations.transformers; {code}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
