"""HF peft on a model in 4 bits, and on its twin with the decoded weights: the same config, the same adapter weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import MODELS
from torch import nn

import peftk
from peftk.nn import NF4Linear

hf = pytest.importorskip("peft")
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS"}


def in_4_bits(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[kind]().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # rows of unequal scale: with equal absmax a wrong block would hide
            if parameter.dim() == 2:
                parameter.mul_(torch.exp(0.5 * torch.randn(len(parameter), 1)))
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return peftk.quantize_model(model, skip=("lm_head", "classifier"), progress=False).eval()


def decoded(model: nn.Module) -> nn.Module:
    """A copy with an nn.Linear, in the model's own dtype, for each 4-bit layer."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            parent, _, name = path.rpartition(".")
            dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            dense.weight = nn.Parameter(module.w4.dequantize(), requires_grad=False)
            dense.bias = module.bias
            setattr(model.get_submodule(parent), name, dense)
    return model


def lora(**fields: Any) -> Any:
    return hf.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **fields})


def adalora(**fields: Any) -> Any:
    names = ["q_proj", "v_proj", "down_proj", "query", "value", "dense"]
    return hf.AdaLoraConfig(
        **{"init_r": 6, "target_r": 3, "total_step": 20, "tinit": 2, "tfinal": 4, "target_modules": names, **fields}
    )


def wrapped(model: nn.Module, config: Any, name: str = "default", **arguments: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hf.get_peft_model(model, copy.deepcopy(config), name, **arguments)


def randomise(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """Random values in all that is trained, as a zero B would hide errors."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def same_adapters(source: nn.Module, target: nn.Module) -> None:
    """Copy every adapter's values."""
    values = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if any(part in name for part in ("lora_", "ranknum", "prompt", "modules_to_save", "hada_", "ia3_", "oft_")):
                parameter.copy_(values[name])


def pair(kind: str, config: Any, dtype: torch.dtype = torch.float32, **arguments: Any) -> tuple[nn.Module, nn.Module]:
    """(in 4 bits, decoded), in eval mode."""
    config.task_type = TASKS[kind]
    base = in_4_bits(kind, dtype)
    twin = decoded(base)
    ours, theirs = (wrapped(model, config, **arguments) for model in (base, twin))
    same_adapters(randomise(ours), theirs)
    return ours.eval(), theirs.eval()


def add(models: tuple[nn.Module, nn.Module], config: Any, name: str) -> None:
    """One more adapter for both, of random values."""
    ours, theirs = models
    for model in models:
        model.add_adapter(name, copy.deepcopy(config))
        model.set_adapter(name)
    same_adapters(randomise(ours), theirs)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, method: str = "forward_low_rank") -> Iterator[list[int]]:
    """How often 4-bit layers are asked for ``method``; a list of one number."""
    calls, original = [0], getattr(NF4Linear, method)

    def counting(self: NF4Linear, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(NF4Linear, method, counting)
        yield calls


def each_layer(model: nn.Module) -> list[nn.Module]:
    """HF peft's layers around 4-bit ones."""
    return [m for m in model.modules() if isinstance(getattr(m, "base_layer", None), NF4Linear)]


def bytes_of(model: nn.Module) -> list[torch.Tensor]:
    return [t.clone() for m in model.modules() if isinstance(m, NF4Linear) for t in m.w4.tensors() if t is not None]
