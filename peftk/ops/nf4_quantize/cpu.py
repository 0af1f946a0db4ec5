"""csrc/ops/nf4_quantize/cpu.cpp"""

import torch

from peftk.format.code4 import code4
from peftk.native import NATIVE_DTYPE, native
from peftk.ops.dispatch import Implementation, reasons_against_cpu, reasons_against_dtype


def reasons_against(w: torch.Tensor, block_size: int, quant_type: str) -> list[str]:
    return reasons_against_cpu(w) + reasons_against_dtype("w", w.dtype)


def run(w: torch.Tensor, block_size: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    w = w.contiguous()
    count = w.numel()
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32)
    native().nf4_quantize(
        w.data_ptr(), NATIVE_DTYPE[w.dtype], count, block_size, code4(quant_type).number, packed.data_ptr(),
        absmax.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return packed, absmax


IMPLEMENTATION = Implementation("cpu", run, reasons_against)
