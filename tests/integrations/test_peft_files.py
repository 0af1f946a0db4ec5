"""Adapters of 4-bit models on disk: HF peft's files, read by HF peft onto fused layers and by peftk, and the other way."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from hf_pairs import adalora, each_layer, gradients, hf, in_4_bits, lora, pair, randomise, wrapped
from tiny_models import batch, fill, weight_grads

import peftk


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Without labels: HF peft's AdaLoRA can't take them where nothing is trained."""
    return model(input_ids=batch("llama")["input_ids"]).logits


CONFIGS = {"lora": lora, "dora": lambda: lora(use_dora=True), "adalora": adalora}


def read(folder: Path, **arguments) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hf.PeftModel.from_pretrained(in_4_bits("llama"), folder, **arguments).eval()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_hf_peft_reads_its_own_files_onto_fused_layers(config: str, low_cpu_mem_usage: bool, tmp_path: Path):
    if config == "adalora" and low_cpu_mem_usage and hf.__version__ < "0.20":
        pytest.skip("this HF peft leaves ranknum without a value")
    ours, _ = pair("llama", CONFIGS[config]())
    ours.save_pretrained(tmp_path)
    again = read(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again), logits(ours))
    assert {type(layer) for layer in each_layer(again)} == {type(layer) for layer in each_layer(ours)}
    assert all(type(layer).__name__.startswith("Fused") for layer in each_layer(again))


def test_a_second_adapter_on_layers_that_had_none(tmp_path: Path):
    second, _ = pair("llama", lora(target_modules=["q_proj", "up_proj"]))
    second.save_pretrained(tmp_path)
    ours, _ = pair("llama", lora(target_modules=["q_proj", "down_proj"]))
    ours.load_adapter(tmp_path, "second")
    ours.set_adapter("second")
    assert torch.equal(logits(ours), logits(second))
    assert len(each_layer(ours)) == 6 and all(type(layer).__name__ == "FusedLinear" for layer in each_layer(ours))


def test_training_goes_on_from_a_file(tmp_path: Path):
    ours, _ = pair("llama", lora())
    ours.save_pretrained(tmp_path)
    again = read(tmp_path, is_trainable=True)
    for model in (ours, again):
        weight_grads(model, "llama")
    assert all(torch.equal(gradients(again)[name], gradient) for name, gradient in gradients(ours).items()) and gradients(ours)


@pytest.mark.parametrize("config", CONFIGS)
def test_peftk_reads_hf_pefts_files(config: str, tmp_path: Path):
    ours, _ = pair("llama", CONFIGS[config]())
    ours.save_pretrained(tmp_path)
    own = in_4_bits("llama")
    peftk.load_adapter(own, tmp_path)
    torch.testing.assert_close(logits(own), logits(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_hf_peft_reads_peftks_files(config: str, tmp_path: Path):
    fields = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    made = {
        "lora": lambda: peftk.LoraConfig(r=4, lora_alpha=6, **fields),
        "dora": lambda: peftk.LoraConfig(r=4, use_dora=True, **fields),
        "adalora": lambda: peftk.AdaLoraConfig(init_r=6, target_r=3, total_step=20, tinit=2, tfinal=4, **fields),
    }[config]()
    own = fill(peftk.attach(in_4_bits("llama"), made))
    peftk.save_adapter(own, tmp_path / "adapter")
    torch.testing.assert_close(logits(read(tmp_path / "adapter")), logits(own), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [hf.PrefixTuningConfig, hf.PromptTuningConfig, hf.PromptEncoderConfig])
def test_prompts_and_prefixes(config: type, tmp_path: Path):
    ours = randomise(wrapped(in_4_bits("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=3))).eval()
    ours.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(read(tmp_path)), logits(ours))


def test_pissa_finds_its_rest_again(tmp_path: Path):
    """The file holds A and B only; the base is decomposed anew when it is read, to the same bytes."""
    ours, _ = pair("llama", lora(init_lora_weights="pissa"))
    ours.save_pretrained(tmp_path)
    assert torch.equal(logits(read(tmp_path)), logits(ours))
