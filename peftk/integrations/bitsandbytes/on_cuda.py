"""bitsandbytes' 4-bit ops on a GPU by peftk's CUDA kernels, for whoever asks: no GPU has run these kernels yet.

What speaks for them: bitsandbytes 0.50.2 launches quantize_4bit on the default stream, whichever is current, and counts elements
in 32 bits; ours take the current stream and 64 bits. For bf16 on sm_80 they have 3.3 instructions an element against 26 for
dequantize_4bit, 16 against 62 for quantize_4bit (bench/results/static.csv). Bytes and values are the same, but for a block of
zeros: codes of 0 there, which decode to -0; codes of 7 here, which decode to 0.

The other ops get a code table as a tensor: to tell which one it is would wait for the GPU at each call, and break CUDA graphs.
"""

from __future__ import annotations

import torch

from peftk.integrations.bitsandbytes.kernels import KERNELS, is_defined
from peftk.ops import gpu
from peftk.replaced import Replacements

OPS = ("quantize_4bit", "dequantize_4bit", "dequantize_4bit.out")
KEY = "CUDA"


def replace(replacements: Replacements) -> None:
    """Each of OPS, or the reason why it stays."""
    for op in OPS:
        if reason := reason_against(op):
            replacements.leave(op, KEY, reason)
        else:
            replacements.kernel(op, KERNELS[op], KEY)


def reason_against(op: str) -> str:
    """Why bitsandbytes' own kernel stays; an empty string where ours takes over."""
    if why := gpu.cuda().why_not():
        return why
    for index in range(torch.cuda.device_count()):
        if (model := gpu.model_of(index)).capability < gpu.LEAST_CAPABILITY:
            least = ".".join(map(str, gpu.LEAST_CAPABILITY))
            return f"{model.name} has compute capability {'.'.join(map(str, model.capability))}, the kernels need {least}"
    if not is_defined(op) or not torch._C._dispatch_has_kernel_for_dispatch_key(f"bitsandbytes::{op}", KEY):
        return "bitsandbytes has no such kernel here"
    return ""
