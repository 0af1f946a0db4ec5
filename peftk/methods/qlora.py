"""QLoRA (Dettmers et al. 2023) as a recipe: 4-bit linear layers, gradient checkpointing, LoRA on all of them.

Norms, embeddings and head keep their dtype. ``qlora_recipe`` has the paper's settings (section 4, appendix B.2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from peftk.methods.attach import attach, check_new_name
from peftk.methods.lora import LoraConfig
from peftk.methods.report import report
from peftk.methods.targets import TASK_HEADS, output_heads
from peftk.nn import quantize_model

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
    clipping at 0.3 for all. Keywords change the adapter's fields. Nothing of the model is changed."""
    is_large = (report(model).total.elements if isinstance(model, nn.Module) else model) >= _LARGE
    config = qlora_config(**{"lora_dropout": 0.05 if is_large else 0.1, **changes})
    return QloraRecipe(config, {"lr": 1e-4 if is_large else 2e-4, "betas": (0.9, 0.999), "weight_decay": 0.0})


def qlora(
    model: nn.Module,
    config: LoraConfig | None = None,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    gradient_checkpointing: bool = True,
    adapter_name: str = "default",
    progress: bool = True,
) -> nn.Module:
    """Quantise the model in place, a layer at a time, and attach LoRA to it (``qlora_recipe(model).config`` if None). Returns
    the model.

    The output head, the config's ``modules_to_save`` and the heads of classification models stay dense.
    ``gradient_checkpointing`` needs a transformers model (or one with the same two methods); TypeError, before anything is
    changed, without them.
    """
    config = qlora_recipe(model).config if config is None else config
    check_new_name(model, adapter_name)
    if gradient_checkpointing:
        _check_checkpointing(model)
    quantize_model(model, _kept_dense(model, config), block_size, double_quant, progress)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return attach(model, config, adapter_name)


def _kept_dense(model: nn.Module, config: LoraConfig) -> tuple[str, ...]:
    heads = {id(head) for head in output_heads(model)}
    paths = [path for path, module in model.named_modules() if id(module) in heads]
    return (*paths, *(config.modules_to_save or ()), *TASK_HEADS.get(config.task_type, ()))


def _check_checkpointing(model: nn.Module) -> None:
    """Inputs of the first layer must get a gradient, so that a checkpointed segment with a frozen base sends one back."""
    for method in ("gradient_checkpointing_enable", "enable_input_require_grads"):
        if not callable(getattr(model, method, None)):
            raise TypeError(
                f"gradient_checkpointing: expected False for a {type(model).__name__}, which has no {method}(), got True"
            )
