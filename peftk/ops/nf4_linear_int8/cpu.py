"""csrc/ops/nf4_linear_int8/cpu.cpp"""

import torch

from peftk.format.code4 import code4
from peftk.format.nf4 import NF4Weight
from peftk.native import NATIVE_DTYPE, address, native
from peftk.ops.dispatch import Implementation
from peftk.ops.nf4_linear import cpu


def run(x, packed, absmax, absmax_scale, absmax_offset, n, block_size, quant_type, bias) -> torch.Tensor:
    rows, packed, absmax = cpu.as_rows(x), packed.contiguous(), absmax.contiguous()
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype)
    bias = bias if bias is None else bias.contiguous()
    native().nf4_linear_int8(
        packed.data_ptr(), absmax.data_ptr(), address(absmax_scale), address(absmax_offset), n, rows.shape[1], block_size,
        code4(quant_type).number, rows.data_ptr(), rows.stride(0), rows.shape[0], NATIVE_DTYPE[x.dtype], address(bias),
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def run_straight(x: torch.Tensor, w4: NF4Weight, bias: torch.Tensor | None) -> torch.Tensor | None:
    """As nf4_linear's: a result past the dispatcher, or None where there is more to do."""
    return cpu.run_straight(x, w4, bias, "nf4_linear_int8")


IMPLEMENTATION = Implementation("cpu", run, cpu.reasons_against)
