"""base_layer and is_adaptable: which classes get the interface."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from peftk.nn import DenseConv1D, DenseLinear, NF4Linear, base_layer, is_adaptable


class OtherLinear(nn.Linear):
    pass


def test_plain_linear():
    linear = nn.Linear(4, 3)
    layer = base_layer(linear)
    assert is_adaptable(linear) and type(layer) is DenseLinear and layer.weight is linear.weight


def test_conv1d():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(3, 4)
    layer = base_layer(conv1d)
    assert is_adaptable(conv1d) and type(layer) is DenseConv1D and layer.weight is conv1d.weight


@pytest.mark.parametrize(
    "make", [lambda: DenseLinear(64, 3), lambda: NF4Linear(64, 3), lambda: DenseConv1D(nn.Parameter(torch.zeros(4, 3)), None)]
)
def test_base_layers_are_their_own(make):
    layer = make()
    assert is_adaptable(layer) and base_layer(layer) is layer


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(3, 4, 1),  # torch's convolution is not transformers' Conv1D
        nn.Embedding(3, 4),
        nn.MultiheadAttention(4, 2).out_proj,  # its weight is read behind forward's back
        OtherLinear(4, 3),
        nn.Bilinear(3, 4, 5),
        nn.Sequential(nn.Linear(4, 3)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_others_are_refused_by_name(module):
    assert not is_adaptable(module)
    with pytest.raises(
        TypeError, match=f"module: expected nn.Linear, Conv1D, DenseLinear or NF4Linear, got {type(module).__name__}"
    ):
        base_layer(module)


@pytest.mark.parametrize("layer", [DenseLinear, DenseConv1D, NF4Linear])
def test_one_interface(layer):
    assert list(inspect.signature(layer.forward_low_rank).parameters) == [
        "self",
        "x",
        "A",
        "B",
        "scale",
        "z",
        "dropout",
        "seed",
        "with_bias",
    ]
    for method in ("forward", "dense_weight", "set_dense_weight", "weight_snapshot", "restore_weight"):
        assert callable(getattr(layer, method))
