"""Methods: one file each, over the base-layer interface; attach.py and merge.py have what a model with adapters does."""

from peftk.methods.attach import (
    attach,
    delete_adapter,
    detach,
    set_adapter,
    trainable_parameters,
)
from peftk.methods.combine import combine_adapters
from peftk.methods.eva import eva_init
from peftk.methods.lora import LoraConfig
from peftk.methods.lora_fields import EvaConfig, LoftQConfig
from peftk.methods.lora_plus import lora_plus_groups
from peftk.methods.merge import disable_adapters, merge, unmerge
from peftk.methods.p_tuning import PTuningConfig
from peftk.methods.p_tuning_v2 import PTuningV2Config
from peftk.methods.prefix_tuning import PrefixTuningConfig
from peftk.methods.prompt_tuning import PromptTuningConfig
from peftk.methods.prompts import drop_encoder
from peftk.methods.qlora import qlora, qlora_config
from peftk.methods.report import report
from peftk.methods.rows import adapters_per_row, prompt_ensemble

__all__ = [
    "EvaConfig",
    "LoftQConfig",
    "LoraConfig",
    "PTuningConfig",
    "PTuningV2Config",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "adapters_per_row",
    "attach",
    "combine_adapters",
    "delete_adapter",
    "detach",
    "disable_adapters",
    "drop_encoder",
    "eva_init",
    "lora_plus_groups",
    "merge",
    "prompt_ensemble",
    "qlora",
    "qlora_config",
    "report",
    "set_adapter",
    "trainable_parameters",
    "unmerge",
]
