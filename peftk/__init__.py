"""peftk: kernels and thin modules for cheap fine-tuning of large models. The public names, grouped; nothing else."""

from peftk import nn, ops
from peftk.checkpoint import load_adapter, save_adapter
from peftk.format.nf4 import NF4Weight
from peftk.info import info
from peftk.methods import (
    HardTemplate,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    PTuningV2Config,
    Verbalizer,
    adapters_per_row,
    attach,
    delete_adapter,
    detach,
    disable_adapters,
    drop_encoder,
    merge,
    precision_at_1,
    prompt_ensemble,
    qlora,
    qlora_config,
    report,
    set_adapter,
    trainable_parameters,
    unmerge,
)
from peftk.nn import quantize_model, use_int8_activations
from peftk.ops import quantize_nf4
from peftk.ops.dispatch import use

__all__ = [
    # weights
    "NF4Weight",
    "quantize_nf4",
    # functions
    "info",
    "ops",
    "use",
    # modules and models
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
    "load_adapter",
    "merge",
    "nn",
    "precision_at_1",
    "prompt_ensemble",
    "qlora",
    "qlora_config",
    "quantize_model",
    "report",
    "save_adapter",
    "set_adapter",
    "trainable_parameters",
    "unmerge",
    "use_int8_activations",
]
