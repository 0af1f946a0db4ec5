"""Ops: contract, reference, autograd and kernels of each in its own room, registered as torch.ops.peftk.*"""

from peftk.ops.blockwise8_dequantize import blockwise8_dequantize
from peftk.ops.blockwise8_quantize import blockwise8_quantize
from peftk.ops.nf4_dequantize import nf4_dequantize
from peftk.ops.nf4_quantize import nf4_quantize, quantize_nf4

__all__ = ["blockwise8_dequantize", "blockwise8_quantize", "nf4_dequantize", "nf4_quantize", "quantize_nf4"]
