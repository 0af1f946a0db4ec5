"""transformers' ``load_in_4bit=True`` and HF peft's QLoRA on a CPU, as their users write it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from numerics import row_scaled
from torch import nn


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model on disk; 48 and 80 are no multiples of a block."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=32))
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = 0.1 * row_scaled(*module.weight.shape)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def loaded(folder: Path, **config) -> nn.Module:
    import transformers

    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, **config)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map="cpu")


def written_out(bnb, model: nn.Module) -> nn.Module:
    """The same model with every 4-bit weight as a dense fp32 one, decoded by the reference."""
    import peftk

    dense = copy.deepcopy(model)
    for path, module in list(dense.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            with peftk.use("reference"):
                w = peftk.NF4Weight.from_state_dict(module.state_dict()).dequantize(torch.float32)
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = nn.Parameter(w, requires_grad=False)
            dense.set_submodule(path, linear)
    return dense


@pytest.mark.parametrize("config", [{}, {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}])
def test_load_in_4bit(bnb, folder: Path, config: dict):
    """``load_in_4bit=True`` alone means FP4."""
    model = loaded(folder, **config)
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 14 and {layer.weight.quant_type for layer in layers} == {config.get("bnb_4bit_quant_type", "fp4")}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    dense, ids = written_out(bnb, model), torch.randint(0, 61, (2, 9))
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-3, atol=1e-4)
        made = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(made, dense.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)) and made.shape == (2, 15)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_qlora_of_hf_peft(bnb, folder: Path):
    """Loss and gradients of every adapter as over dense weights; a step of AdamW8bit then moves them and nothing else."""
    peft = pytest.importorskip("peft")
    model = loaded(folder, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    dense, ids = written_out(bnb, model), torch.randint(0, 61, (3, 11))
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    tuned = []
    for base in (model, dense):
        base.is_loaded_in_4bit = base is model
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned.append(peft.get_peft_model(base, config).train())
    losses = [one(input_ids=ids, labels=ids).loss for one in tuned]
    assert torch.allclose(*losses, rtol=1e-4)
    for loss in losses:
        loss.backward()
    ours, wanted = ({name: p for name, p in one.named_parameters() if p.requires_grad} for one in tuned)
    assert len(ours) == 28 and ours.keys() == wanted.keys()
    for name, parameter in ours.items():
        assert torch.allclose(parameter.grad, wanted[name].grad, rtol=1e-3, atol=1e-5 * wanted[name].grad.abs().max()), name
    if not hasattr(bnb.backends.cpu.ops, "_optimizer_update_32bit_cpu"):
        return
    before = {name: p.detach().clone() for name, p in tuned[0].named_parameters()}
    bnb.optim.AdamW8bit(ours.values(), lr=1e-2).step()
    changed = {name for name, p in tuned[0].named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(ours)
