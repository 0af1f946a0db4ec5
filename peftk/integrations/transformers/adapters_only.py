"""``save_pretrained`` and Trainer's checkpoints of a model with peftk's adapters: the adapters, in HF peft's files."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import WEIGHTS_NAME

from peftk.integrations.adapter_state import check_loaded, write_adapters
from peftk.integrations.transformers.bound import Bound
from peftk.methods.attach import find_attached


def save_adapters_only(model: nn.Module) -> nn.Module:
    """Where ``model`` has adapters (peftk.attach), its ``save_pretrained`` writes them in HF peft's files, so ``Trainer.save_model``
    does, and nothing of the base model. In Trainer's own checkpoints ``pytorch_model.bin`` is beside them, with the adapters'
    parameters only, from which Trainer resumes exactly and loads its best model. Returns the model.

    ``from_pretrained`` with an NF4Config has done this already. Without adapters the model is saved as before.
    """
    if "save_pretrained" not in vars(model):
        model.save_pretrained = Bound(_save_pretrained, model)
        model.register_load_state_dict_post_hook(check_loaded)
    return model


def has_adapters(model: nn.Module) -> bool:
    return find_attached(model) is not None


def _save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """The class's own, but for a model with adapters. ``state_dict`` isn't read then: adapters are taken from the model."""
    if not has_adapters(model):
        facts = {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub}
        return type(model).save_pretrained(model, save_directory, **facts, **kwargs)
    if push_to_hub:
        raise ValueError("push_to_hub: expected False for a model with adapters; push the folder once it is written")
    for config in find_attached(model).configs.values():
        config.base_model_name_or_path = config.base_model_name_or_path or getattr(model, "name_or_path", None)
    # Of the names that Trainer looks for in its checkpoints, this is the one that it reads with load_state_dict on any model.
    is_checkpoint = re.fullmatch(r"checkpoint-\d+", Path(save_directory).name) is not None
    if is_main_process:
        write_adapters(model, save_directory, WEIGHTS_NAME if is_checkpoint else None)
