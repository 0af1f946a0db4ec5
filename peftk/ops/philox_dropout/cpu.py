"""csrc/ops/philox_dropout/cpu.cpp"""

import torch

from peftk.native import NATIVE_DTYPE, native
from peftk.ops.dispatch import Implementation, reasons_against_cpu, reasons_against_dtype


def reasons_against(x: torch.Tensor, p: float, seed: int) -> list[str]:
    return reasons_against_cpu(x) + reasons_against_dtype("x", x.dtype)


def run(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    native().philox_dropout(
        x.data_ptr(), NATIVE_DTYPE[x.dtype], x.numel(), int(p * 2**32), 1 / (1 - p), seed, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


IMPLEMENTATION = Implementation("cpu", run, reasons_against)
