"""Decode double-quantised NF4 to bf16: into memory that is mapped, and into a fresh tensor, where page faults take their share.

"bitsandbytes kernel" is its C function called past its Python, because its out= overloads have no CPU kernel (LOG.md);
"bitsandbytes copy" is what its public functions can do for mapped memory.
"""

from collections.abc import Iterator

import torch

import peftk
from bench import peers
from bench.goals import Goal
from bench.measure import Candidate, Case, Work, relative_error
from peftk.format.code4 import values4
from peftk.format.dynamic8 import NESTED_BLOCK, values8

GOAL_MAPPED = Goal("bitsandbytes kernel", 1.5)
GOAL_FRESH = Goal("bitsandbytes", 1)


def decode_fp64(w4: peftk.NF4Weight) -> torch.Tensor:
    """W in fp64 arithmetic, without the definition's roundings."""
    device = w4.device
    absmax = w4.absmax.double()
    if w4.absmax_scale is not None:
        scale = w4.absmax_scale.double().repeat_interleave(NESTED_BLOCK)[: w4.absmax.numel()]
        absmax = values8(True, device).double()[w4.absmax.long()] * scale + w4.absmax_offset.double()
    codes = torch.stack((w4.packed >> 4, w4.packed & 15), -1).view(-1)[: w4.shape.numel()]
    values = values4(w4.quant_type, device).double()[codes.long()]
    return (values * absmax.repeat_interleave(w4.block_size)[: values.numel()]).view(w4.shape)


def cases(size: int) -> Iterator[Case]:
    w = torch.randn(size, size).mul_(torch.randn(size, 1).exp_()).bfloat16()
    w4 = peftk.quantize_nf4(w)
    truth = decode_fp64(w4)
    work = Work(read=w4.nbytes, write=w.nbytes)
    ours, kernel, copied = (torch.zeros_like(w) for _ in range(3))

    def error(result: torch.Tensor) -> float:
        return relative_error(result, truth)

    bitsandbytes = [peers.BITSANDBYTES]
    yield Case(
        f"{size}x{size} to bf16, mapped memory",
        work,
        [
            Candidate("peftk", lambda: w4.dequantize(out=ours), error),
            peers.candidate("bitsandbytes kernel", bitsandbytes, lambda: peers.bnb_dequantize_4bit_kernel(w4, kernel), error),
            peers.candidate("bitsandbytes copy", bitsandbytes, lambda: peers.bnb_dequantize_4bit(w4, copied), error),
        ],
        GOAL_MAPPED,
    )
    yield Case(
        f"{size}x{size} to bf16, fresh result",
        work,
        [
            Candidate("peftk", w4.dequantize, error),
            peers.candidate("bitsandbytes", bitsandbytes, lambda: peers.bnb_dequantize_4bit(w4), error),
        ],
        GOAL_FRESH,
    )
