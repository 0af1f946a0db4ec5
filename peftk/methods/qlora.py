"""QLoRA (Dettmers et al. 2023) as a recipe: 4-bit linear layers, gradient checkpointing, LoRA on all of them.

Norms, embeddings and head keep their dtype. The paper's settings (section 4, appendix B): r = 64, alpha = 16, dropout 0.1 up to
13B parameters and 0.05 beyond, a constant learning rate of 2e-4 (1e-4 from 33B), clipping at 0.3, Adam's beta2 0.999.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from peftk.methods.attach import attach, check_new_name
from peftk.methods.lora import LoraConfig
from peftk.methods.targets import TASK_HEADS, output_heads
from peftk.nn import quantize_model


def qlora_config(**changes: Any) -> LoraConfig:
    """The paper's adapter: LoRA on all linear layers, r = 64, alpha = 16, dropout 0.1; keywords change fields."""
    return LoraConfig(**{"r": 64, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": "all-linear", **changes})


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
    """Quantise the model in place, a layer at a time, and attach LoRA to it (``qlora_config()`` if None). Returns the model.

    The output head, the config's ``modules_to_save`` and the heads of classification models stay dense.
    ``gradient_checkpointing`` needs a transformers model (or one with the same two methods); TypeError, before anything is
    changed, without them.
    """
    config = qlora_config() if config is None else config
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
