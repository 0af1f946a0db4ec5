"""HF peft's whole round on a model read with an NF4Config: as on one from ``peftk.quantize_model``, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_pairs import adalora, bytes_of, counted, each_layer, gradients, hf, lora, randomise, same_adapters, wrapped
from saved_models import auto_class, inputs, saved
from torch import nn

import peftk
from peftk.integrations.transformers import NF4Config
from peftk.nn import NF4Linear, nf4_linear

CONFIGS = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "adalora": adalora,
    "prefix": lambda: hf.PrefixTuningConfig(num_virtual_tokens=3),
    "prompt": lambda: hf.PromptTuningConfig(num_virtual_tokens=3),
    "p-tuning": lambda: hf.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16),
}
ON_LAYERS = ("lora", "dora", "adalora")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "dense")


def read(folder: Path, **arguments) -> nn.Module:
    return auto_class("llama").from_pretrained(folder, **arguments).eval()


def in_4_bits(folder: Path) -> nn.Module:
    return read(folder, quantization_config=NF4Config())


def adapted(base: nn.Module, config: str) -> nn.Module:
    made = CONFIGS[config]()
    made.task_type = "CAUSAL_LM"
    return randomise(wrapped(base, made)).eval()


def logits(model: nn.Module, **arguments) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(), **arguments).logits


@pytest.mark.parametrize("config", CONFIGS)
def test_step_file_and_merge(folder: Path, tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch):
    ours = adapted(in_4_bits(folder), config)
    twin = adapted(peftk.quantize_model(read(folder), progress=False), config)
    same_adapters(ours, twin)
    with counted(monkeypatch) as calls:
        for model in (ours, twin):
            ids = inputs()["input_ids"]
            model(input_ids=ids, labels=ids).loss.backward()
    assert gradients(ours) and gradients(ours).keys() == gradients(twin).keys()
    assert all(torch.equal(gradient, gradients(twin)[name]) for name, gradient in gradients(ours).items())
    assert any(isinstance(module, NF4Linear) for module in ours.modules())
    assert calls[0] == (2 * len(each_layer(ours)) if config in ON_LAYERS else 0)

    ours.save_pretrained(tmp_path / "adapter")
    again = hf.PeftModel.from_pretrained(in_4_bits(folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), logits(ours))
    if config not in ON_LAYERS:
        return
    merged = ours.merge_and_unload()
    assert not each_layer(merged) and any(isinstance(module, NF4Linear) for module in merged.modules())
    merged.save_pretrained(tmp_path / "merged")
    stored = read(tmp_path / "merged")
    assert all(torch.equal(a, b) for a, b in zip(bytes_of(stored), bytes_of(merged), strict=True))
    assert torch.equal(logits(stored), logits(merged))


def test_several_adapters(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """load_adapter, set_adapter, and each row of a batch its own."""
    second = adapted(in_4_bits(folder), "lora")
    second.save_pretrained(tmp_path / "second")
    ours = adapted(in_4_bits(folder), "lora")
    with torch.no_grad():
        for parameter in peftk.trainable_parameters(ours):
            parameter.mul_(-1.5)
    base, first = logits(in_4_bits(folder)), logits(ours)
    ours.load_adapter(tmp_path / "second", "second")
    ours.set_adapter("second")
    assert torch.equal(logits(ours), logits(second)) and not torch.equal(logits(ours), first)
    calls, op = [], nf4_linear.nf4_lora_linear_rows
    monkeypatch.setattr(nf4_linear, "nf4_lora_linear_rows", lambda *a: calls.append(1) or op(*a))
    mixed = logits(ours, adapter_names=["second", "__base__"])
    torch.testing.assert_close(mixed[0], logits(second)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], base[1], rtol=1e-4, atol=1e-4)
    assert len(calls) == len(each_layer(ours))
