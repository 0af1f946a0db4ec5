"""Ops: contract, reference, autograd and kernels of each in its own room, registered as torch.ops.peftk.*"""

from peftk.ops.adamw_step import adamw_step, adamw_step8
from peftk.ops.ademamix_step import ademamix_step, ademamix_step8
from peftk.ops.blockwise8_dequantize import blockwise8_dequantize
from peftk.ops.blockwise8_quantize import blockwise8_quantize
from peftk.ops.choices import explain
from peftk.ops.lion_step import lion_step, lion_step8
from peftk.ops.lora_linear import lora_linear
from peftk.ops.nf4_dequantize import nf4_dequantize
from peftk.ops.nf4_linear import nf4_linear
from peftk.ops.nf4_linear_int8 import nf4_linear_int8
from peftk.ops.nf4_lora_linear import nf4_lora_linear
from peftk.ops.nf4_lora_linear_rows import nf4_lora_linear_rows
from peftk.ops.nf4_quantize import nf4_quantize, quantize_nf4
from peftk.ops.philox_dropout import philox_dropout

__all__ = [
    "adamw_step",
    "adamw_step8",
    "ademamix_step",
    "ademamix_step8",
    "blockwise8_dequantize",
    "blockwise8_quantize",
    "explain",
    "lion_step",
    "lion_step8",
    "lora_linear",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_linear_int8",
    "nf4_lora_linear",
    "nf4_lora_linear_rows",
    "nf4_quantize",
    "philox_dropout",
    "quantize_nf4",
]
