"""QLoRA's settings are the paper's, and what is quantised and adapted is what it says."""

from __future__ import annotations

import pytest
import torch
from tiny_models import llama
from torch import nn

import peftk
from peftk.methods.adalora_linear import AdaLoraLinear
from peftk.methods.lora_linear import LoraLinear


@pytest.mark.parametrize(
    ("parameters", "lr", "dropout"), [(6.7e9, 2e-4, 0.1), (13.0e9, 2e-4, 0.1), (32.5e9, 1e-4, 0.05), (65.2e9, 1e-4, 0.05)]
)
def test_the_papers_settings_by_size(parameters, lr, dropout):
    recipe = peftk.qlora_recipe(parameters)
    assert recipe.optimizer == {"lr": lr, "betas": (0.9, 0.999), "weight_decay": 0.0}
    assert (recipe.max_grad_norm, recipe.schedule) == (0.3, "constant")
    config = recipe.config
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (64, 16, dropout, "all-linear")


def test_a_model_counts_by_what_it_was_before_quantisation():
    with torch.device("meta"):
        large = nn.Sequential(*[nn.Linear(50_000, 50_000, bias=False) for _ in range(13)])  # 32.5e9
    assert peftk.qlora_recipe(large).optimizer["lr"] == 1e-4
    assert peftk.qlora_recipe(large[:5]).optimizer["lr"] == 2e-4
    assert peftk.qlora_recipe(llama(), r=8).config.r == 8


def test_the_recipe_on_a_model():
    model = llama()
    recipe = peftk.qlora_recipe(model, r=4)
    peftk.qlora(model, recipe.config, progress=False)
    adapted = [module for module in model.modules() if isinstance(module, LoraLinear)]
    assert len(adapted) == 14  # q, k, v, o, gate, up and down of two layers
    for layer in adapted:
        assert isinstance(layer.base_layer, peftk.nn.NF4Linear) and layer.base_layer.double_quant
        assert layer.base_layer.quant_type == "nf4" and layer.base_layer.block_size == 64
        assert layer.dropout["default"] == 0.1 and layer.scaling["default"] == 16 / 4
    assert type(model.lm_head) is nn.Linear and model.is_gradient_checkpointing
    optimizer = torch.optim.AdamW(peftk.trainable_parameters(model), **recipe.optimizer)
    assert optimizer.defaults["lr"] == 2e-4


def test_the_adapter_alone_is_the_papers():
    model = peftk.qlora(llama(), progress=False)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].shape == (64, 32) and layer.scaling["default"] == 0.25


def test_adalora_on_four_bits():
    model = peftk.qlora(llama(), peftk.AdaLoraConfig(total_step=10), progress=False)
    layers = [module for module in model.modules() if isinstance(module, AdaLoraLinear)]
    assert len(layers) == 14 and all(isinstance(layer.base_layer, peftk.nn.NF4Linear) for layer in layers)
