"""Which modules have a base-layer interface, and how a plain one gets it."""

from __future__ import annotations

from torch import nn

from peftk.nn.dense_linear import DenseConv1D, DenseLinear, is_conv1d
from peftk.nn.nf4_linear import NF4Linear

BASE_LAYERS = (DenseLinear, DenseConv1D, NF4Linear)


def check_module(module: object, argument: str = "model") -> None:
    """TypeError for what isn't an nn.Module."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{argument}: expected an nn.Module, got {type(module).__name__}")


def is_adaptable(module: nn.Module) -> bool:
    """Whether ``base_layer`` takes this module. Subclasses of nn.Linear that are not ours are left alone: others read their
    weight behind forward's back (the output projection of nn.MultiheadAttention, for one)."""
    return isinstance(module, BASE_LAYERS) or type(module) is nn.Linear or is_conv1d(module)


def base_layer(module: nn.Module) -> DenseLinear | DenseConv1D | NF4Linear:
    """The module itself where it is a base layer, else one that shares its parameters. TypeError names another class."""
    if isinstance(module, BASE_LAYERS):
        return module
    if type(module) is nn.Linear:
        return DenseLinear.from_linear(module)
    if is_conv1d(module):
        return DenseConv1D.from_conv1d(module)
    raise TypeError(f"module: expected nn.Linear, Conv1D, DenseLinear or NF4Linear, got {type(module).__name__}")
