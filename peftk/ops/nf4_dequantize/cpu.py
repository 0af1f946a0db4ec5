"""csrc/ops/nf4_dequantize/cpu.cpp"""

import torch

from peftk.format.code4 import code4
from peftk.native import NATIVE_DTYPE, address, native
from peftk.ops.dispatch import Implementation, reasons_against_cpu, reasons_against_dtype


def reasons_against(packed, absmax, absmax_scale, absmax_offset, block_size, quant_type, out) -> list[str]:
    return reasons_against_cpu(packed, absmax, absmax_scale, absmax_offset, out) + reasons_against_dtype("out", out.dtype)


def run(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    absmax_scale: torch.Tensor | None,
    absmax_offset: torch.Tensor | None,
    block_size: int,
    quant_type: str,
    out: torch.Tensor,
) -> None:
    packed, absmax = packed.contiguous(), absmax.contiguous()
    native().nf4_dequantize(
        packed.data_ptr(), absmax.data_ptr(), address(absmax_scale), address(absmax_offset), 0, out.numel(), block_size,
        code4(quant_type).number, out.data_ptr(), NATIVE_DTYPE[out.dtype], torch.get_num_threads(),
    )  # fmt: skip


IMPLEMENTATION = Implementation("cpu", run, reasons_against)
