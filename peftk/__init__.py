"""peftk: kernels and thin modules for cheap fine-tuning of large models. Its public names, and HF peft's registration."""

from peftk import nn, ops, optim
from peftk.checkpoint import load_adapter, save_adapter
from peftk.format.nf4 import NF4Weight
from peftk.info import info
from peftk.integrations.peft import register as _register_with_hf_peft
from peftk.methods import (
    AdaLoraConfig,
    EvaConfig,
    HardTemplate,
    LoftQConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    PTuningV2Config,
    Verbalizer,
    adalora_schedule,
    adapters_per_row,
    attach,
    combine_adapters,
    compact,
    delete_adapter,
    detach,
    disable_adapters,
    drop_encoder,
    eva_init,
    lora_plus_groups,
    merge,
    orthogonality_loss,
    precision_at_1,
    prompt_ensemble,
    qlora,
    qlora_config,
    qlora_recipe,
    rank_allocator,
    report,
    set_adapter,
    trainable_parameters,
    unmerge,
    update_and_allocate,
)
from peftk.nn import quantize_model, use_int8_activations
from peftk.ops import quantize_nf4
from peftk.ops.dispatch import use
from peftk.version import VERSION as __version__

__all__ = [
    "__version__",
    # weights
    "NF4Weight",
    "quantize_nf4",
    # functions
    "info",
    "ops",
    "use",
    # modules and models
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
    "load_adapter",
    "eva_init",
    "lora_plus_groups",
    "merge",
    "nn",
    "orthogonality_loss",
    "precision_at_1",
    "prompt_ensemble",
    "qlora",
    "qlora_config",
    "qlora_recipe",
    "quantize_model",
    "rank_allocator",
    "report",
    "save_adapter",
    "set_adapter",
    "trainable_parameters",
    "unmerge",
    "update_and_allocate",
    "use_int8_activations",
    # optimizers
    "optim",
]

_register_with_hf_peft()
