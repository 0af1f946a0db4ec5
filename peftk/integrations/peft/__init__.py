"""HF peft on 4-bit layers: its own functions, configs and files, with peftk's fused op underneath.

    model = peftk.quantize_model(model)
    model = get_peft_model(model, LoraConfig(...))      # HF peft's

HF peft has no registry of layer classes, and its configs come from disk as well. So a layer that HF peft makes becomes a subclass
of itself (``classes.py``) at the moment it takes a 4-bit base layer, which torch's hook for module registrations reports. Nothing
of HF peft is replaced, and it is all the same who makes the layer: get_peft_model, PeftModel.from_pretrained, load_adapter,
inject_adapter_in_model, transformers' add_adapter.

- LoRA, rsLoRA, AdaLoRA, DoRA: one active adapter runs in ``peftk.ops.nf4_lora_linear``, forward and backward, dropout inside.
  With 16-bit x it rounds A, B and x A^T to x.dtype and sums in fp32, where HF peft computes the branch in fp32.
- ``adapter_names=``, LoRA without dropout: all rows in one ``peftk.ops.nf4_lora_linear_rows`` on a CPU.
- Several active adapters, lora_bias, hooks on parts of the layer, other variants: HF peft's own code around
  the 4-bit product.
- Merging, of every tuner: all adapters in fp32 from the original weight, then one quantisation; unmerging puts the bytes back.
  What is smaller than a code's step is lost in it, as after a few steps of training almost everything is.
- Around bitsandbytes' Linear4bit, where ``peftk.integrations.bitsandbytes`` is on: the fused op for LoRA and AdaLoRA, on its
  bytes where they lie; all else, merging and DoRA too, is HF peft's own.
- Starts taken from W (PiSSA, OLoRA, MiCA, orthogonal): on the decoded weight; what is left of it is quantised once.

``peftk`` does ``register()`` when it is imported, unless the environment says PEFTK_PEFT=0.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from peftk.integrations.peft.classes import adopt, is_quantised
from peftk.replaced import tell

logger = logging.getLogger("peftk")
VERSIONS = (0, 18), (0, 21)  # of HF peft, the first and the last that this was run with
_handles: list[RemovableHandle] = []


def register() -> None:
    """From now on layers that HF peft puts around 4-bit layers are fused ones. Nothing where they are already, or where the
    environment says PEFTK_PEFT=0."""
    tell("peft", status)
    if not _handles and os.environ.get("PEFTK_PEFT") != "0":
        _handles.append(register_module_module_registration_hook(_on_registration))


def unregister() -> None:
    """Layers that HF peft makes from now on are its own; those that are fused stay so."""
    while _handles:
        _handles.pop().remove()


def status() -> str:
    """What happens to HF peft's layers around 4-bit ones, why, and how to change that; imports nothing."""
    try:
        version("peft")
    except PackageNotFoundError:
        return "not installed"
    if os.environ.get("PEFTK_PEFT") == "0" and not _handles:
        return "left alone: the environment says PEFTK_PEFT=0"
    if not _handles:
        return "left alone: peftk.integrations.peft.unregister() was called; register() takes its layers up again"
    if reason := _why_not():
        return f"left alone: {reason}"
    return (
        "its layers around 4-bit ones become peftk's, by a hook on torch's module registrations; off: PEFTK_PEFT=0 or "
        "peftk.integrations.peft.unregister()"
    )


def fuse(model: nn.Module) -> nn.Module:
    """Switch the layers that HF peft put around 4-bit layers before ``register``, in place. Returns the model. ValueError where
    it has none; RuntimeError for a version of HF peft that isn't known."""
    if reason := _why_not():
        raise RuntimeError(reason)
    found = [m for m in model.modules() if is_quantised(m._modules.get("base_layer")) and adopt(m, m.base_layer)]
    if not found:
        raise ValueError(
            f"model: expected 4-bit layers inside HF peft's, got a {type(model).__name__} without; quantise it first"
        )
    return model


def _on_registration(module: nn.Module, name: str, child: nn.Module | None) -> None:
    """torch calls this for every module that another one takes."""
    if name == "base_layer" and is_quantised(child) and "peft" in sys.modules and not _is_unknown_version():
        adopt(module, child)


def _why_not() -> str:
    """Why HF peft's layers are left alone; empty where they aren't."""
    there = getattr(sys.modules.get("peft"), "__version__", None) or version("peft")
    first, last = (".".join(map(str, v)) for v in VERSIONS)
    if VERSIONS[0] <= tuple(int(part) for part in there.split(".")[:2]) <= VERSIONS[1]:
        return ""
    return f"peft: expected {first} to {last}, got {there}: its layers stay without the fused op and merging"


@cache
def _is_unknown_version() -> bool:
    """Said once."""
    if reason := _why_not():
        logger.warning(reason)
    return bool(reason)
