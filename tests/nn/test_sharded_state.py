import copy

import pytest
import torch

import peftk


def layer(k: int = 128, **facts) -> peftk.nn.NF4Linear:
    made = torch.nn.Sequential(peftk.nn.NF4Linear(k, 48, **facts))
    return peftk.nn.constants_as_parameters(made)[0]


@pytest.mark.parametrize("facts", [{}, {"double_quant": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("assign", [True, False])
def test_round_trip(facts, assign):
    one, other = layer(**facts), layer(**facts)
    state = copy.deepcopy(one.state_dict())
    assert state["weight"].shape == (48, 64) and state["absmax"].dtype == torch.uint8
    other.load_state_dict(state, assign=assign)
    x = torch.randn(3, 128)
    assert torch.equal(one(x), other(x))
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


def test_refuses_other_facts_and_loads_nothing():
    one, other = layer(block_size=64), layer()
    other.quant_type = "fp4"
    before = other.weight.clone()
    with pytest.raises(RuntimeError, match=r'quant_facts: expected .*"fp4".*, got .*"nf4"'):
        other.load_state_dict(one.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for absmax: expected \(96,\)"):
        layer().load_state_dict(layer(block_size=32).state_dict())
    assert torch.equal(other.weight, before)


def test_names_what_is_missing_and_unexpected():
    state = layer().state_dict()
    del state["absmax_scale"]
    state["other"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r'(?s)Missing key\(s\).*"absmax_scale".*Unexpected key\(s\).*"other"'):
        layer().load_state_dict(state)
