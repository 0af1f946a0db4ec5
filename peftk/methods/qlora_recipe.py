"""QLoRA's settings as its paper has them (Dettmers et al. 2023, section 4 and appendix B.2)."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from peftk.methods.lora import LoraConfig
from peftk.methods.report import report

# The paper trains LLaMA of 6.7, 13.0, 32.5 and 65.2 billion parameters, the two larger ones with half the rate and dropout.
_LARGE = 30e9


def qlora_config(**changes: Any) -> LoraConfig:
    """The paper's adapter: LoRA on all linear layers, r = 64, alpha = 16, dropout 0.1 (0.05 for models of 33B parameters and
    more: ``qlora_recipe(model).config``); keywords change fields."""
    return LoraConfig(**{"r": 64, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": "all-linear", **changes})


@dataclass(frozen=True)
class QloraRecipe:
    """The paper's settings: weights in NF4 with double quantisation, this adapter, and a paged AdamW with ``optimizer``'s
    keywords, whose rate stays constant."""

    config: LoraConfig
    optimizer: dict[str, Any] = field(default_factory=dict)  # lr, betas, weight_decay
    max_grad_norm: float = 0.3
    schedule: str = "constant"


def qlora_recipe(model: nn.Module | float, **changes: Any) -> QloraRecipe:
    """For a model, or a number of parameters: up to 13B a rate of 2e-4 and dropout 0.1, from 33B 1e-4 and 0.05; beta2 0.999 and
    clipping at 0.3 for all. Keywords change the adapter's fields. Nothing of the model is changed.
    ValueError where ``model`` is neither."""
    count = report(model).total.elements if isinstance(model, nn.Module) else model
    if isinstance(count, bool) or not isinstance(count, numbers.Real) or not count > 0:
        raise ValueError(f"model: expected an nn.Module or a number of parameters, got {model!r}")
    is_large = count >= _LARGE
    config = qlora_config(**{"lora_dropout": 0.05 if is_large else 0.1, **changes})
    return QloraRecipe(config, {"lr": 1e-4 if is_large else 2e-4, "betas": (0.9, 0.999), "weight_decay": 0.0})
