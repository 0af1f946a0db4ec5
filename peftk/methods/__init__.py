"""Methods: one file each, over the base-layer interface; attach.py and merge.py have what a model with adapters does."""

from peftk.methods.adalora import AdaLoraConfig
from peftk.methods.adalora_schedule import adalora_schedule, rank_allocator, update_and_allocate
from peftk.methods.attach import (
    attach,
    delete_adapter,
    detach,
    set_adapter,
    trainable_parameters,
)
from peftk.methods.combine import combine_adapters
from peftk.methods.compaction import compact
from peftk.methods.eva import eva_init
from peftk.methods.hard_template import HardTemplate, Verbalizer, precision_at_1
from peftk.methods.lora import LoraConfig
from peftk.methods.lora_fields import EvaConfig, LoftQConfig
from peftk.methods.lora_plus import lora_plus_groups
from peftk.methods.merge import disable_adapters, merge, unmerge
from peftk.methods.orthogonality import orthogonality_loss
from peftk.methods.p_tuning import PTuningConfig
from peftk.methods.p_tuning_v2 import PTuningV2Config
from peftk.methods.prefix_tuning import PrefixTuningConfig
from peftk.methods.prompt_tuning import PromptTuningConfig
from peftk.methods.prompts import drop_encoder
from peftk.methods.qlora import qlora
from peftk.methods.qlora_recipe import qlora_config, qlora_recipe
from peftk.methods.report import report
from peftk.methods.rows import adapters_per_row, prompt_ensemble

__all__ = [
    "AdaLoraConfig",
    "EvaConfig",
    "LoftQConfig",
    "HardTemplate",
    "LoraConfig",
    "PTuningConfig",
    "PTuningV2Config",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "adalora_schedule",
    "Verbalizer",
    "adapters_per_row",
    "attach",
    "combine_adapters",
    "compact",
    "delete_adapter",
    "detach",
    "disable_adapters",
    "drop_encoder",
    "eva_init",
    "lora_plus_groups",
    "merge",
    "orthogonality_loss",
    "precision_at_1",
    "prompt_ensemble",
    "qlora",
    "qlora_config",
    "qlora_recipe",
    "rank_allocator",
    "report",
    "set_adapter",
    "trainable_parameters",
    "unmerge",
    "update_and_allocate",
]
