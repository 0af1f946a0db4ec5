"""Which subclass of itself a layer of HF peft becomes around a 4-bit layer."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from peftk.integrations.peft.fused import FusedAdaLora, FusedLora
from peftk.integrations.peft.on_nf4 import AdaLoraOnNF4, LoraOnNF4, OnNF4
from peftk.nn import NF4Linear

# In front of HF peft's classes; of its other tuners' OnNF4 alone.
_ON_NF4: dict[str, tuple[type, ...]] = {
    "peft.tuners.lora.layer.Linear": (LoraOnNF4, FusedLora),
    "peft.tuners.adalora.layer.SVDLinear": (AdaLoraOnNF4, FusedAdaLora),
}


def is_quantised(module: Any) -> bool:
    """Whether it is a 4-bit layer."""
    return isinstance(module, NF4Linear)


def adopt(module: nn.Module) -> bool:
    """Give the layer that HF peft puts around a 4-bit one its class. False where it isn't one of HF peft's."""
    if hasattr(type(module), "STOCK"):
        return True
    made = fused_class(type(module))
    if made is not None:
        module.__class__ = made
    return made is not None


@cache
def fused_class(stock: type[nn.Module]) -> type[nn.Module] | None:
    """HF peft's class with ours in front of it; None where there is none for it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not issubclass(stock, BaseTunerLayer) or not stock.__module__.startswith("peft.tuners."):
        return None
    kinds = _ON_NF4.get(f"{stock.__module__}.{stock.__name__}", (OnNF4,))
    facts = {"__module__": __name__, "__reduce_ex__": _reduce, "STOCK": stock}
    return type(f"Fused{stock.__name__}", (*kinds, stock), facts)


def _reduce(layer: nn.Module, protocol: Any) -> tuple:
    """Pickle finds HF peft's class by its name, and ours by HF peft's."""
    return _blank, (layer.STOCK,), layer.__dict__


def _blank(stock: type[nn.Module]) -> nn.Module:
    made = fused_class(stock)
    return made.__new__(made)
