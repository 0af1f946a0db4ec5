"""accelerate: ``save_state`` and ``load_state`` with adapters in the place of whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from peftk.integrations.adapter_state import read_state, write_adapters
from peftk.methods.attach import find_attached

STATE = "peftk_state.bin"


def save_adapters_only(accelerator: Any) -> None:
    """From now on ``accelerator.save_state`` writes a model's adapters, in HF peft's files and one that ``load_state`` fills them
    from exactly, and neither touches its other weights. Models without adapters are saved as before."""

    def folder(place: str, index: int) -> Path:
        return Path(place) / ("" if index == 0 else f"model_{index}")

    def ours(models: list[nn.Module]) -> list[tuple[int, nn.Module]]:
        inner = [(index, accelerator.unwrap_model(model)) for index, model in enumerate(models)]
        return [(index, model) for index, model in reversed(inner) if find_attached(model) is not None]

    def save(models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        for index, model in ours(models):
            del weights[index]
            if accelerator.is_main_process:
                write_adapters(model, folder(output_dir, index), STATE)

    def load(models: list[nn.Module], input_dir: str) -> None:
        for index, model in ours(models):
            del models[index]
            read_state(model, folder(input_dir, index) / STATE)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
