"""``save_pretrained`` and Trainer's checkpoints of a model with peftk's adapters: the adapters, in HF peft's files."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import WEIGHTS_NAME

from peftk.integrations.adapter_state import check_loaded, fit_to_loaded, write_adapters
from peftk.methods.attach import find_attached


def save_adapters_only(model: nn.Module) -> nn.Module:
    """Where ``model`` has adapters (peftk.attach), its ``save_pretrained`` writes them in HF peft's files, and so does
    ``Trainer.save_model``, with nothing of the base model. In Trainer's own checkpoints ``pytorch_model.bin`` is beside them,
    with the adapters' parameters only, from which Trainer resumes exactly and loads its best model. Returns the model.

    ``from_pretrained`` with an NF4Config has done this already. Without adapters the model is saved as before. The model's class
    becomes a subclass of what it was, under the same name.
    """
    if not isinstance(model, AdaptersOnly):
        model.__class__ = _subclass(type(model))
        model.register_load_state_dict_pre_hook(fit_to_loaded)
        model.register_load_state_dict_post_hook(check_loaded)
    return model


def has_adapters(model: nn.Module) -> bool:
    return find_attached(model) is not None


class AdaptersOnly:
    """What ``save_adapters_only`` adds to a model's class: an attribute of the model itself would keep it alive."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """The class's own, but for a model with adapters. ``state_dict`` isn't read then: adapters are taken from the model."""
        if not has_adapters(self):
            facts = {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub}
            return super().save_pretrained(save_directory, **facts, **kwargs)
        if push_to_hub:
            raise ValueError("push_to_hub: expected False for a model with adapters; push the folder once it is written")
        for config in find_attached(self).configs.values():
            config.base_model_name_or_path = config.base_model_name_or_path or getattr(self, "name_or_path", None)
        # Of the names that Trainer looks for in its checkpoints, this is the one that it reads with load_state_dict on any model.
        is_checkpoint = re.fullmatch(r"checkpoint-\d+", Path(save_directory).name) is not None
        if is_main_process:
            write_adapters(self, save_directory, WEIGHTS_NAME if is_checkpoint else None)

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        """Copies and pickles name the class that can be found."""
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _new, (type(self).__mro__[2],), *state


@functools.cache
def _subclass(cls: type) -> type:
    return type(cls.__name__, (AdaptersOnly, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _new(cls: type) -> nn.Module:
    return object.__new__(_subclass(cls))
