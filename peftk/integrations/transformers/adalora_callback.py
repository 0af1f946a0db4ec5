"""AdaLoRA in transformers' Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from peftk.methods.adalora import names_in
from peftk.methods.adalora_schedule import AdaLoraSchedule, adalora_schedule
from peftk.methods.attach import attached


class AdaLoraCallback(TrainerCallback):
    """``Trainer(model, ..., callbacks=[AdaLoraCallback()])`` after ``peftk.attach(model, peftk.AdaLoraConfig(...))``: each step
    does AdaLoRA's part, for every active adapter of its kind. ``total_step`` is as many steps as Trainer makes, whatever the
    config says. Trainer's checkpoints hold the ranks, too, where ``save_adapters_only`` is in force, so that it resumes exactly.

    ``schedules``: by adapter, of the last training; each has ``history``.
    """

    def __init__(self) -> None:
        self.schedules: dict[str, AdaLoraSchedule] = {}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """ValueError for a model without AdaLoRA adapters, or of fewer steps than their configs leave room for."""
        self._leave()
        active = [name for name in names_in(model) if name in attached(model).active]
        self.schedules = {name: adalora_schedule(model, optimizer, state.max_steps, name) for name in active}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._leave()

    def _leave(self) -> None:
        for schedule in self.schedules.values():
            schedule.remove()
