"""csrc/ops/nf4_dequantize/cuda.cu"""

import torch

from peftk.format.code4 import code4
from peftk.native import NATIVE_DTYPE
from peftk.ops import gpu
from peftk.ops.dispatch import Implementation, reasons_against_dtype


def reasons_against(packed, absmax, absmax_scale, absmax_offset, block_size, quant_type, out) -> list[str]:
    tensors = (packed, absmax, absmax_scale, absmax_offset, out)
    return gpu.cuda().reasons_against(*tensors) + reasons_against_dtype("out", out.dtype)


def run(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    absmax_scale: torch.Tensor | None,
    absmax_offset: torch.Tensor | None,
    block_size: int,
    quant_type: str,
    out: torch.Tensor,
) -> None:
    constants = (packed.contiguous(), absmax.contiguous(), absmax_scale, absmax_offset)
    number, dtype = code4(quant_type).number, NATIVE_DTYPE[out.dtype]
    gpu.cuda().call("nf4_dequantize", *constants, 0, out.numel(), block_size, number, out, dtype)


IMPLEMENTATION = Implementation("cuda", run, reasons_against)
