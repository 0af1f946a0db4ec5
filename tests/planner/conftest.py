"""A llama of a few narrow layers as a blueprint, prepared as `peftk finetune` does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import peftk
from peftk.cli.prepare import prepare_base
from peftk.planner import Blueprint
from peftk.planner.ledger import GROUPED_SINCE

transformers = pytest.importorskip("transformers")

CONFIGS = {
    "lora": lambda: peftk.LoraConfig(r=4, target_modules="all-linear"),
    "dora": lambda: peftk.LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    "adalora": lambda: peftk.AdaLoraConfig(init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1, target_modules="all-linear"),
    "prefix": lambda: peftk.PrefixTuningConfig(num_virtual_tokens=5),
    "prompt": lambda: peftk.PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init="RANDOM"),
    "ptuning": lambda: peftk.PTuningConfig(num_virtual_tokens=5),
}


def narrow(layers: int = 3, **other: Any) -> Any:
    """The config: d = 128, 4 heads over 2 where torch plans such, 320 tokens."""
    return transformers.LlamaConfig(
        **{
            "vocab_size": 320,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2 if torch.__version__ >= GROUPED_SINCE else 4,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
            **other,
        }
    )


def preparation(method: str = "lora", base: str = "nf4") -> Callable[[nn.Module], None]:
    """On whatever device the model lies."""

    def prepare(model: nn.Module) -> None:
        if method == "full":
            model.requires_grad_(True)
            return
        prepare_base(model, base, torch.bfloat16, next(model.parameters()).device)
        peftk.attach(model, CONFIGS[method]())

    return prepare


@pytest.fixture
def blueprint() -> Callable[..., Blueprint]:
    """Makes one: (method, base, layers)."""

    def make(method: str = "lora", base: str = "nf4", layers: int = 3, **other: Any) -> Blueprint:
        return Blueprint(narrow(layers, **other), torch.bfloat16, preparation(method, base))

    return make
