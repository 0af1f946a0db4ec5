"""The regulariser: HF peft's value, autograd's gradient."""

from __future__ import annotations

import pytest
import torch
from tiny_models import Net, batch, fill, llama, twins

import peftk
from peftk.methods.orthogonality import add_gradient, factors

FIELDS = {"total_step": 10, "init_r": 4, "target_r": 2, "orth_reg_weight": 0.3}


def test_the_loss_with_it_equals_hfs():
    """Of AdaLoraModel: a PeftModel without a task_type goes past it and loses the regulariser."""
    ours, theirs = twins(llama(), {**FIELDS, "target_modules": ["q_proj", "v_proj"]}, "AdaLoraConfig")
    plain = ours(**batch("llama")).loss
    total = plain + peftk.orthogonality_loss(ours)
    expected = theirs.base_model(**batch("llama")).loss
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    total.backward(), expected.backward()
    layer, hf_layer = ours.model.layers[0].self_attn.v_proj, theirs.base_model.model.model.layers[0].self_attn.v_proj
    for name in ("lora_A", "lora_B", "lora_E"):
        torch.testing.assert_close(getattr(layer, name)["default"].grad, getattr(hf_layer, name)["default"].grad)


@pytest.mark.parametrize("before", ["none", "some"])
def test_the_added_gradient_is_autograds(before):
    model = fill(peftk.attach(Net(), peftk.AdaLoraConfig(**FIELDS)), scale=0.5)
    parameters = [f for f, _ in factors(model, "default")]
    expected = [g.clone() for g in torch.autograd.grad(peftk.orthogonality_loss(model), parameters)]
    if before == "some":
        for i, p in enumerate(parameters):
            p.grad = torch.full_like(p, float(i))
            expected[i] += i
    add_gradient(factors(model, "default"), 0.3)
    for p, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)
        assert p.grad.stride() == p.stride()


def test_orthogonal_vectors_have_no_loss_and_no_gradient():
    model = peftk.attach(Net(), peftk.AdaLoraConfig(**FIELDS))
    with torch.no_grad():
        for factor, is_columns in factors(model, "default"):
            factor.copy_(torch.eye(*factor.shape) if not is_columns else torch.eye(*factor.shape[::-1]).T)
    assert peftk.orthogonality_loss(model).item() == 0
    add_gradient(factors(model, "default"), 0.3)
    assert all(not f.grad.any() for f, _ in factors(model, "default"))


def test_an_adapters_name_is_no_part_of_anothers():
    """HF peft also takes "default2" where "default" is meant."""
    model = fill(peftk.attach(Net(), peftk.AdaLoraConfig(**FIELDS)))
    alone = peftk.orthogonality_loss(model)
    fill(peftk.attach(model, peftk.AdaLoraConfig(**FIELDS), "default2"), "default2", scale=3.0)
    assert torch.equal(peftk.orthogonality_loss(model, "default"), alone)
    both = peftk.orthogonality_loss(model, "default") + peftk.orthogonality_loss(model, "default2")
    peftk.set_adapter(model, ["default", "default2"])
    assert torch.equal(peftk.orthogonality_loss(model), both)


def test_no_adalora_is_an_error():
    model = peftk.attach(Net(), peftk.LoraConfig(target_modules=["q"]), "lora")
    with pytest.raises(ValueError, match="model: expected one with AdaLoRA adapters, got one with lora"):
        peftk.orthogonality_loss(model)
    peftk.attach(model, peftk.AdaLoraConfig(**{**FIELDS, "target_modules": ["v"]}), "ada")
    with pytest.raises(ValueError, match="adapter_name: expected an AdaLoRA adapter, got 'lora', a LORA"):
        peftk.orthogonality_loss(model, "lora")
    peftk.set_adapter(model, "lora")
    with pytest.raises(ValueError, match="model: expected an active AdaLoRA adapter, got lora as active"):
        peftk.orthogonality_loss(model)
