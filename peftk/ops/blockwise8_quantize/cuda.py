"""csrc/ops/blockwise8_quantize/cuda.cu"""

import torch

from peftk.native import NATIVE_DTYPE
from peftk.ops import gpu
from peftk.ops.dispatch import Implementation, reasons_against_dtype


def reasons_against(x: torch.Tensor, block_size: int, signed: bool) -> list[str]:
    return gpu.cuda().reasons_against(x) + reasons_against_dtype("x", x.dtype)


def run(x: torch.Tensor, block_size: int, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-x.numel() // block_size), dtype=torch.float32, device=x.device)
    gpu.cuda().call("blockwise8_quantize", x, NATIVE_DTYPE[x.dtype], x.numel(), block_size, signed, codes, absmax)
    return codes, absmax


IMPLEMENTATION = Implementation("cuda", run, reasons_against)
