import copy

import pytest
import torch
from tiny_models import net, run

import peftk


def held(double_quant: bool) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model in 4 bits, and the same with its constants as Parameters."""
    torch.manual_seed(0)
    model = peftk.quantize_model(net(), ("head",), 64, double_quant, progress=False)
    return model, peftk.nn.constants_as_parameters(copy.deepcopy(model))


@pytest.mark.parametrize("double_quant", [True, False])
def test_computes_and_counts_the_same(double_quant):
    plain, model = held(double_quant)
    layer = model.layers[0]["q"]
    assert layer.absmax.dtype == torch.uint8 and not layer.absmax.requires_grad
    assert any(name.endswith("q.absmax") for name, _ in model.named_parameters())
    assert torch.equal(run(model, "net"), run(plain, "net"))
    assert peftk.report(model) == peftk.report(plain)
    for one, other in zip(layer.w4.tensors(), plain.layers[0]["q"].w4.tensors(), strict=True):
        assert one is other is None or torch.equal(one.view(-1), other.view(-1))


def test_casting_leaves_the_bytes():
    plain, model = held(False)
    model.bfloat16()
    assert torch.equal(model.layers[0]["q"].dense_weight(), plain.layers[0]["q"].dense_weight())


def test_takes_a_file_and_a_new_weight():
    plain, model = held(True)
    w = torch.randn(32, 32)
    for layer in (plain.layers[0]["q"], model.layers[0]["q"]):
        layer.set_dense_weight(w)
    assert torch.equal(run(model, "net"), run(plain, "net"))
    other = peftk.nn.constants_as_parameters(net("nf4"))
    other.load_state_dict(plain.state_dict())
    assert "absmax" in other.layers[0]["q"]._parameters and torch.equal(run(other, "net"), run(plain, "net"))
