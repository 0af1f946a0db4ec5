"""peftk: kernels and thin modules for cheap fine-tuning of large models. The public names, grouped; nothing else."""

from peftk import nn, ops
from peftk.format.nf4 import NF4Weight
from peftk.info import info
from peftk.nn import quantize_model
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
    "nn",
    "quantize_model",
]
