"""csrc/ops/blockwise8_dequantize/cuda.cu"""

import torch

from peftk.native import NATIVE_DTYPE
from peftk.ops import gpu
from peftk.ops.dispatch import Implementation, reasons_against_dtype


def reasons_against(codes: torch.Tensor, absmax: torch.Tensor, block_size: int, signed: bool, dtype: torch.dtype) -> list[str]:
    return gpu.cuda().reasons_against(codes, absmax) + reasons_against_dtype("dtype", dtype)


def run(codes: torch.Tensor, absmax: torch.Tensor, block_size: int, signed: bool, dtype: torch.dtype) -> torch.Tensor:
    codes, absmax = codes.contiguous(), absmax.contiguous()
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    gpu.cuda().call("blockwise8_dequantize", codes, absmax, codes.numel(), block_size, signed, out, NATIVE_DTYPE[dtype])
    return out


IMPLEMENTATION = Implementation("cuda", run, reasons_against)
