"""csrc/ops/philox_dropout/cuda.cu"""

import torch

from peftk.native import NATIVE_DTYPE
from peftk.ops import gpu
from peftk.ops.dispatch import Implementation, reasons_against_dtype


def reasons_against(x: torch.Tensor, p: float, seed: int) -> list[str]:
    return gpu.cuda().reasons_against(x) + reasons_against_dtype("x", x.dtype)


def run(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    gpu.cuda().call("philox_dropout", x, NATIVE_DTYPE[x.dtype], x.numel(), int(p * 2**32), 1 / (1 - p), seed, out)
    return out


IMPLEMENTATION = Implementation("cuda", run, reasons_against)
