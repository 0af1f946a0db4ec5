"""Which subclass of itself a layer of HF peft becomes around a 4-bit layer, ours or bitsandbytes'."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from torch import nn

from peftk.integrations import bitsandbytes
from peftk.integrations.peft.fused import FusedAdaLora, FusedLora
from peftk.integrations.peft.on_bitsandbytes import OnBitsandbytes
from peftk.integrations.peft.on_nf4 import AdaLoraOnNF4, LoraOnNF4, OnNF4
from peftk.nn import NF4Linear

# In front of HF peft's classes; around an NF4Linear its other tuners' have OnNF4 alone.
_ON_NF4: dict[str, tuple[type, ...]] = {
    "peft.tuners.lora.layer.Linear": (LoraOnNF4, FusedLora),
    "peft.tuners.adalora.layer.SVDLinear": (AdaLoraOnNF4, FusedAdaLora),
}
_ON_BITSANDBYTES: dict[str, tuple[type, ...]] = {
    "peft.tuners.lora.bnb.Linear4bit": (OnBitsandbytes, FusedLora),
    "peft.tuners.adalora.bnb.SVDLinear4bit": (OnBitsandbytes, FusedAdaLora),
}


def is_quantised(module: Any) -> bool:
    """Whether it is a 4-bit layer of ours, or one of bitsandbytes', where peftk has taken that over."""
    if isinstance(module, NF4Linear):
        return True
    theirs = sys.modules.get("bitsandbytes")
    return theirs is not None and bitsandbytes.is_enabled() and isinstance(module, theirs.nn.Linear4bit)


def adopt(module: nn.Module, base_layer: nn.Module) -> bool:
    """Give the layer that HF peft puts around a 4-bit one its class. False where there is none for it."""
    if hasattr(type(module), "STOCK"):
        return True
    made = fused_class(type(module), isinstance(base_layer, NF4Linear))
    if made is not None:
        module.__class__ = made
    return made is not None


@cache
def fused_class(stock: type[nn.Module], on_nf4: bool) -> type[nn.Module] | None:
    """HF peft's class with ours in front of it; None where there is none for it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    name = f"{stock.__module__}.{stock.__name__}"
    if not issubclass(stock, BaseTunerLayer) or not name.startswith("peft.tuners."):
        return None
    kinds = _ON_NF4.get(name, (OnNF4,)) if on_nf4 else _ON_BITSANDBYTES.get(name)
    if kinds is None:
        return None
    facts = {"__module__": __name__, "__reduce_ex__": _reduce, "STOCK": stock, "on_nf4": on_nf4}
    return type(f"Fused{stock.__name__}", (*kinds, stock), facts)


def _reduce(layer: nn.Module, protocol: Any) -> tuple:
    """Pickle finds HF peft's class by its name, and ours by HF peft's."""
    return _blank, (layer.STOCK, layer.on_nf4), layer.__dict__


def _blank(stock: type[nn.Module], on_nf4: bool) -> nn.Module:
    made = fused_class(stock, on_nf4)
    return made.__new__(made)
