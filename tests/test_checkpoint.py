"""Adapters on disk: HF peft's files both ways, strict, and nothing half-written."""

from __future__ import annotations

import copy
import json

import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftk
from peftk import LoraConfig, attach, load_adapter, save_adapter

CONFIG, TENSORS, ENCODER = "adapter_config.json", "adapter_model.safetensors", "peftk_encoder.safetensors"
CASES = {
    "linear": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "default targets": ("llama", {}),
    "patterns": (
        "llama",
        {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 3}, "alpha_pattern": {"q_proj": 32}},
    ),
    "rslora": ("llama", {"target_modules": ["up_proj"], "use_rslora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "bias": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "lora_only bias": ("bert", {"target_modules": ["query"], "bias": "lora_only"}),
    "saved whole": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "classification": ("bert", {"task_type": "SEQ_CLS"}),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "use_rslora": True}),
    "dora on an embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True}),
}


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def close(a: nn.Module, b: nn.Module, kind: str) -> None:
    with torch.no_grad():
        torch.testing.assert_close(tiny.run(a.eval(), kind), tiny.run(b.eval(), kind), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_hf_peft_reads_ours(case, tmp_path):
    peft = pytest.importorskip("peft")
    kind, fields = CASES[case]
    ours = tiny.MODELS[kind]().eval()
    base = copy.deepcopy(ours)
    moved(attach(ours, LoraConfig(r=4, lora_alpha=8, **fields)))
    save_adapter(ours, tmp_path / "a")
    close(ours, peft.PeftModel.from_pretrained(base, tmp_path / "a"), kind)


@pytest.mark.parametrize("case", CASES)
def test_ours_reads_hf_pefts(case, tmp_path):
    peft = pytest.importorskip("peft")
    kind, fields = CASES[case]
    base = tiny.MODELS[kind]().eval()
    theirs = moved(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=8, **fields)))
    theirs.save_pretrained(tmp_path / "a")
    load_adapter(base, tmp_path / "a")
    close(theirs, base, kind)
    assert not peftk.trainable_parameters(base)


@pytest.mark.parametrize("kind", ["net", "llama", "gpt2", "t5"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_round_trip(kind, base, tmp_path):
    model = tiny.MODELS[kind]().eval()
    if base == "nf4":
        peftk.quantize_model(model, progress=False)
    twin = copy.deepcopy(model)
    moved(attach(model, LoraConfig(r=4, target_modules="all-linear"), "mine"))
    save_adapter(model, tmp_path / "a", "mine")
    load_adapter(twin, tmp_path / "a", "theirs", is_trainable=True)
    close(model, twin, kind)
    assert len(peftk.trainable_parameters(twin)) == len(peftk.trainable_parameters(model))
    save_adapter(twin, tmp_path / "b", "theirs")
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()


@pytest.fixture
def saved(tmp_path):
    save_adapter(moved(attach(tiny.Net(), LoraConfig(target_modules=["q"]))), tmp_path / "a")
    return tmp_path / "a"


def test_strict_keys_and_shapes(saved):
    tensors = load_file(saved / TENSORS)
    first = sorted(tensors)[0]
    corrupted = {
        "missing": {k: v for k, v in tensors.items() if k != first},
        "unexpected": {**tensors, "base_model.model.ghost.lora_A.weight": torch.zeros(1)},
        "shape": {**tensors, first: torch.zeros(5, 5)},
    }
    for what, content in corrupted.items():
        save_file(content, saved / TENSORS)
        model = tiny.Net()
        attach(model, LoraConfig(target_modules=["q"]), "before")
        state = tiny.state_of(model)
        with pytest.raises(ValueError) as error:
            load_adapter(model, saved)
        assert str(saved / TENSORS) in str(error.value)
        assert (first if what != "unexpected" else "ghost") in str(error.value)
        tiny.assert_same_state(state, tiny.state_of(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_qalora": True}, "use_qalora"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"r": -1}, "r: expected a positive integer"),
    ],
)
def test_what_is_not_supported_is_refused(saved, change, message):
    fields = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**fields, **change}))
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(tiny.Net(), saved)
    assert str(saved / CONFIG) in str(error.value)


def test_broken_files_are_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_adapter(tiny.Net(), tmp_path / "nowhere")
    (saved / TENSORS).write_bytes((saved / TENSORS).read_bytes()[:100])
    with pytest.raises(ValueError, match=TENSORS):
        load_adapter(tiny.Net(), saved)
    (saved / TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=TENSORS):
        load_adapter(tiny.Net(), saved)
    (saved / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=CONFIG):
        load_adapter(tiny.Net(), saved)


def test_other_files_in_the_folder_stay(saved):
    (saved / "tokenizer.json").write_text("x")
    save_adapter(attach(tiny.Net(), LoraConfig(target_modules=["q"])), saved)
    assert (saved / "tokenizer.json").read_text() == "x"


def test_a_save_that_dies_leaves_the_old_adapter(saved, monkeypatch):
    """At each step: writing the tensors, syncing, taking the place."""
    import os

    import peftk.checkpoint

    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    model = attach(tiny.Net(), LoraConfig(r=3, target_modules=["q"]))

    def die(*_args, **_kwargs):
        raise OSError("no space left on device")

    for owner, name in ((peftk.checkpoint, "write_tensors"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, die)
            with pytest.raises(OSError, match="no space left"):
                save_adapter(model, saved)
        assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
        assert [p.name for p in saved.parent.iterdir()] == [saved.name]


PROMPT = {"num_virtual_tokens": 3, "encoder_hidden_size": 8}


def test_a_prompts_files_are_strict_too(tmp_path):
    save_adapter(attach(tiny.gpt2(), peftk.PTuningConfig(**PROMPT)), tmp_path / "a")
    tensors, encoder = load_file(tmp_path / "a" / TENSORS), load_file(tmp_path / "a" / ENCODER)
    corrupted = [
        (TENSORS, {}, "missing keys: expected tensors"),
        (TENSORS, {**tensors, "ghost": torch.zeros(1)}, "unexpected keys: .*ghost"),
        (
            TENSORS,
            {"prompt_embeddings": torch.zeros(2, 32)},
            r"other shapes: prompt_embeddings: .*\(3, 32\), got \(2, 32\)",
        ),
        (ENCODER, {**encoder, "ghost": torch.zeros(1)}, "unexpected keys: ghost"),
        (ENCODER, {k: v for k, v in encoder.items() if k != "embedding.weight"}, "missing keys: embedding.weight"),
    ]
    for name, content, message in corrupted:
        save_file(tensors, tmp_path / "a" / TENSORS)
        save_file(encoder, tmp_path / "a" / ENCODER)
        save_file(content, tmp_path / "a" / name)
        model = attach(tiny.gpt2(), LoraConfig(target_modules=["c_attn"]), "before")
        state = tiny.state_of(model)
        with pytest.raises(ValueError, match=message) as error:
            load_adapter(model, tmp_path / "a", is_trainable=True)
        assert str(tmp_path / "a" / name) in str(error.value)
        tiny.assert_same_state(state, tiny.state_of(model))
    (tmp_path / "a" / CONFIG).write_text(json.dumps({"peft_type": "P_TUNING", "num_virtual_tokens": 3, "rank": 4}))
    with pytest.raises(ValueError, match="expected a P_TUNING without rank=4"):
        load_adapter(tiny.gpt2(), tmp_path / "a")
    save_adapter(attach(tiny.llama(), peftk.PrefixTuningConfig(**PROMPT)), tmp_path / "b")
    with pytest.raises(ValueError, match=f"{CONFIG}: token_dim: expected 32, as the model has it, got 16"):
        load_adapter(tiny.llama(num_key_value_heads=4), tmp_path / "b")


def test_no_encoder_of_another_prompt_stays_in_the_folder(tmp_path):
    save_adapter(attach(tiny.gpt2(), peftk.PTuningConfig(**PROMPT)), tmp_path / "a")
    assert (tmp_path / "a" / ENCODER).is_file()
    save_adapter(attach(tiny.gpt2(), peftk.PromptTuningConfig(num_virtual_tokens=3)), tmp_path / "a")
    assert not (tmp_path / "a" / ENCODER).exists()
    load_adapter(tiny.gpt2(), tmp_path / "a", is_trainable=True)


def test_bad_arguments_are_named(tmp_path):
    model = attach(tiny.Net(), LoraConfig(target_modules=["q"]))
    with pytest.raises(ValueError, match="no adapter called 'x'"):
        save_adapter(model, tmp_path / "a", "x")
    with pytest.raises(ValueError, match="expected one with adapters"):
        save_adapter(tiny.Net(), tmp_path / "a")
