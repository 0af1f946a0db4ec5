"""P-Tuning v2 (Liu et al. 2022): Prefix Tuning's keys and values in every layer, by default without an MLP, and a task's own head
on [CLS] or on every token instead of verbalisers. Several tasks: a shared prefix and a task's own, active together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from peftk.methods.prefix_tuning import PrefixTuningConfig
from peftk.methods.targets import TASK_HEADS


@dataclass
class PTuningV2Config(PrefixTuningConfig):
    """PrefixTuningConfig's fields; the file is HF peft's for Prefix Tuning, which computes the same.

    ``num_virtual_tokens`` is the knob: few for classification, about 100 for tagging (section 4.3). The heads that SEQ_CLS,
    TOKEN_CLS and QUESTION_ANS name are trained whole; ValueError where the model has none and ``modules_to_save`` names none.
    """

    encoder_hidden_size: int | None = 512  # of the MLP, where there is one

    def checks(self) -> dict[str, tuple[bool, str]]:
        return {**super().checks(), "variant": (self.variant == "prefix", '"prefix"')}

    def build(self, model: nn.Module) -> nn.Module:
        heads = TASK_HEADS.get(self.task_type, ())
        if heads and not self.modules_to_save and not any(path.endswith(heads) for path, _ in model.named_modules()):
            raise ValueError(
                f"task_type: expected a model with a head called {' or '.join(heads)} for {self.task_type}, got none"
            )
        return super().build(model)
