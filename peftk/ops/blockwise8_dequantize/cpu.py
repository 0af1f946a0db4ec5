"""csrc/ops/blockwise8_dequantize/cpu.cpp"""

import torch

from peftk.native import NATIVE_DTYPE, native
from peftk.ops.dispatch import Implementation, reasons_against_cpu, reasons_against_dtype


def reasons_against(codes: torch.Tensor, absmax: torch.Tensor, block_size: int, signed: bool, dtype: torch.dtype) -> list[str]:
    return reasons_against_cpu(codes, absmax) + reasons_against_dtype("dtype", dtype)


def run(codes: torch.Tensor, absmax: torch.Tensor, block_size: int, signed: bool, dtype: torch.dtype) -> torch.Tensor:
    codes, absmax = codes.contiguous(), absmax.contiguous()
    out = torch.empty(codes.shape, dtype=dtype)
    native().blockwise8_dequantize(
        codes.data_ptr(), absmax.data_ptr(), codes.numel(), block_size, signed, out.data_ptr(), NATIVE_DTYPE[dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return out


IMPLEMENTATION = Implementation("cpu", run, reasons_against)
