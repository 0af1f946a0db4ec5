"""Methods: one file each, over the base-layer interface; attach.py has what a model with adapters does."""

from peftk.methods.attach import (
    attach,
    delete_adapter,
    detach,
    disable_adapters,
    merge,
    set_adapter,
    trainable_parameters,
    unmerge,
)
from peftk.methods.hard_template import HardTemplate, Verbalizer, precision_at_1
from peftk.methods.lora import LoraConfig
from peftk.methods.p_tuning import PTuningConfig
from peftk.methods.p_tuning_v2 import PTuningV2Config
from peftk.methods.prefix_tuning import PrefixTuningConfig
from peftk.methods.prompt_tuning import PromptTuningConfig
from peftk.methods.prompts import drop_encoder
from peftk.methods.qlora import qlora, qlora_config
from peftk.methods.report import report
from peftk.methods.rows import adapters_per_row, prompt_ensemble

__all__ = [
    "HardTemplate",
    "LoraConfig",
    "PTuningConfig",
    "PTuningV2Config",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "Verbalizer",
    "adapters_per_row",
    "attach",
    "delete_adapter",
    "detach",
    "disable_adapters",
    "drop_encoder",
    "merge",
    "precision_at_1",
    "prompt_ensemble",
    "qlora",
    "qlora_config",
    "report",
    "set_adapter",
    "trainable_parameters",
    "unmerge",
]
