"""csrc/ops/nf4_quantize/cuda.cu"""

import torch

from peftk.format.code4 import code4
from peftk.native import NATIVE_DTYPE
from peftk.ops import gpu
from peftk.ops.dispatch import Implementation, reasons_against_dtype


def reasons_against(w: torch.Tensor, block_size: int, quant_type: str) -> list[str]:
    return gpu.cuda().reasons_against(w) + reasons_against_dtype("w", w.dtype)


def run(w: torch.Tensor, block_size: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    w, count = w.contiguous(), w.numel()
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=w.device)
    gpu.cuda().call("nf4_quantize", w, NATIVE_DTYPE[w.dtype], count, block_size, code4(quant_type).number, packed, absmax)
    return packed, absmax


IMPLEMENTATION = Implementation("cuda", run, reasons_against)
