"""AdaLoRA on convolutions: against HF peft where that one runs, against the merged weight everywhere."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import assert_same_state, fill, gradients_of_hf, state_of, twins
from torch import nn

import peftk
from peftk.checkpoint import adapter_tensors
from peftk.methods.adalora_conv import AdaLoraConv

FIELDS = {"total_step": 10, "init_r": 4, "target_r": 2, "tfinal": 4}
WINDOWS = {
    "1d": (1, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "2d": (2, {"kernel_size": (3, 2), "padding": "same", "padding_mode": "circular"}),
    "2d dilated": (2, {"kernel_size": 3, "dilation": 2, "padding": 2, "bias": False}),
    "3d": (3, {"kernel_size": 2}),
}


def net(dims: int, **window) -> nn.Module:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return nn.Sequential(kind(3, 8, **window), nn.Tanh(), nn.Flatten(), nn.LazyLinear(5))


def started(name: str) -> tuple[nn.Module, torch.Tensor]:
    dims, window = WINDOWS[name]
    model, x = net(dims, **window), torch.randn(4, 3, *[6] * dims)
    model(x)
    return fill(peftk.attach(model, peftk.AdaLoraConfig(target_modules=["0", "3"], **FIELDS))), x


@pytest.mark.parametrize(
    "window", [{"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": (1, 2), "dilation": 2}], ids=str
)
def test_outputs_and_gradients_equal_hf(window):
    model, x = net(2, **window), torch.randn(4, 3, 7, 7)
    model(x)
    ours, theirs = twins(model, {"target_modules": ["0", "3"], **FIELDS}, "AdaLoraConfig")
    for each in (ours, theirs):
        (each(x) * torch.linspace(-1, 1, 20).view(4, 5)).sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    for key, parameter in adapter_tensors(ours, "default").items():
        torch.testing.assert_close(parameter.grad, gradients_of_hf(theirs)[key], rtol=1e-4, atol=1e-6)
        assert parameter.grad.any()


@pytest.mark.parametrize("name", WINDOWS)
def test_the_branch_is_the_merged_weights(name):
    model, x = started(name)
    y, plain = model(x), copy.deepcopy(model[0].base_layer)
    peftk.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    peftk.unmerge(model)
    assert torch.equal(model[0].weight, plain.weight) and torch.equal(model(x), y)


def test_pruned_and_compacted():
    model, x = started("2d")
    optimizer = torch.optim.AdamW(peftk.trainable_parameters(model), lr=0.01)
    schedule = peftk.adalora_schedule(model, optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
    assert isinstance(model[0], AdaLoraConv) and sum(schedule.allocator.ranks().values()) == 4
    assert model[0].lora_A["default"].shape == (schedule.allocator.ranks()["0"], 18)
    model(x).sum().backward()


def test_rows_dropout_and_rank_0():
    model, x = started("1d")
    pattern = {"0.lora_E": [False] * 4}
    config = peftk.AdaLoraConfig(target_modules=["0"], rank_pattern=pattern, lora_dropout=0.5, **FIELDS)
    fill(peftk.attach(model, config, "nothing"), "nothing")
    model.eval()
    with peftk.adapters_per_row(model, ["default", "__base__", "nothing", "default"]):
        together = model(x)
    for row, name in enumerate(["default", "nothing", "nothing", "default"]):
        peftk.set_adapter(model, name)
        torch.testing.assert_close(together[row], model(x)[row])


def test_groups_are_refused():
    model = nn.Sequential(nn.Conv1d(6, 8, 3, groups=2))
    before = state_of(model)
    with pytest.raises(ValueError, match="target_modules: 0 is a convolution with groups=2, and what AdaLoRA adds goes across"):
        peftk.attach(model, peftk.AdaLoraConfig(target_modules=["0"], **FIELDS))
    assert_same_state(before, state_of(model))
