"""QLoRA (Dettmers et al. 2023) as a recipe: 4-bit linear layers, gradient checkpointing, LoRA on all of them.

Norms, embeddings and head keep their dtype. The paper's settings (section 4, appendix B): r = 64, alpha = 16, dropout 0.1 up to
13B parameters and 0.05 beyond, a constant learning rate of 2e-4 (1e-4 from 33B), clipping at 0.3, Adam's beta2 0.999.
"""

from __future__ import annotations

from torch import nn

from peftk.methods.attach import attach
from peftk.methods.lora import LoraConfig
from peftk.nn import quantize_model


def qlora_config(**changes) -> LoraConfig:
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
    """Quantise the model in place and attach LoRA to it. Returns the model.

    ``gradient_checkpointing`` needs a transformers model (or one with the same two methods); without them it is a TypeError.
    """
    quantize_model(model, block_size=block_size, double_quant=double_quant, progress=progress)
    if gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return attach(model, config or qlora_config(), adapter_name)


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward pass. Inputs of the first layer get a gradient, so that a checkpointed segment
    whose weights are all frozen still sends one back."""
    for method in ("gradient_checkpointing_enable", "enable_input_require_grads"):
        if not callable(getattr(model, method, None)):
            raise TypeError(f"model: gradient checkpointing expects a model with {method}(), got {type(model).__name__}")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
