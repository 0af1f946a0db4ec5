"""Learning rates of LoRA+ (Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", section 5): B learns faster
than A."""

from __future__ import annotations

from typing import Any

from torch import nn


def loraplus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, weight_decay: float = 0.0, part: str = "lora_B"
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer, of the model's parameters that want a gradient, with their names: those with ``part``
    in their name at ``ratio * lr``, the others at ``lr``. ValueError where the model has nothing of either kind."""
    wanted = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    fast = [(name, p) for name, p in wanted if part in name.split(".")]
    slow = [(name, p) for name, p in wanted if part not in name.split(".")]
    if not fast or not slow:
        raise ValueError(f"model: expected trainable parameters with and without {part!r}, got {len(fast)} and {len(slow)}")
    common = {"weight_decay": weight_decay}
    return [{"params": slow, "lr": lr, **common}, {"params": fast, "lr": ratio * lr, **common}]
