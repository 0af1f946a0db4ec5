"""csrc/ops/blockwise8_quantize/cpu.cpp"""

import torch

from peftk.native import NATIVE_DTYPE, native
from peftk.ops.dispatch import Implementation, reasons_against_cpu, reasons_against_dtype


def reasons_against(x: torch.Tensor, block_size: int, signed: bool) -> list[str]:
    return reasons_against_cpu(x) + reasons_against_dtype("x", x.dtype)


def run(x: torch.Tensor, block_size: int, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8)
    absmax = torch.empty(-(-x.numel() // block_size), dtype=torch.float32)
    native().blockwise8_quantize(
        x.data_ptr(), NATIVE_DTYPE[x.dtype], x.numel(), block_size, signed, codes.data_ptr(), absmax.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return codes, absmax


IMPLEMENTATION = Implementation("cpu", run, reasons_against)
