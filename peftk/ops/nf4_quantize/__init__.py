"""nf4_quantize: W -> 4-bit codes and one constant a block (Dettmers et al. 2023, QLoRA, sections 2 and 3).

code = code_of_rank[#{thresholds t : w * (1 / absmax) > t}] in fp32, absmax[b] = max |w| over block b of the flat tensor;
element 2i lies in the high nibble of byte i. A block of zeros has absmax 0 and the code of 0.
Double quantisation: offset = mean(absmax) in fp64, rounded once; absmax - offset -> blockwise8_quantize in blocks of 256.
"""

from __future__ import annotations

import math

import torch

from peftk.format.code4 import BLOCK_SIZES, code4
from peftk.format.dynamic8 import NESTED_BLOCK
from peftk.format.nf4 import NF4Weight
from peftk.ops import dispatch, gpu, library
from peftk.ops.blockwise8_quantize import blockwise8_quantize
from peftk.ops.nf4_quantize import cpu, cuda, reference


def _against_triton(w: torch.Tensor, block_size: int, quant_type: str) -> list[str]:
    reasons = gpu.triton().reasons_against(w) + dispatch.reasons_against_dtype("w", w.dtype)
    return reasons + ([] if block_size in BLOCK_SIZES else [f"block_size is {block_size}, the kernel takes {BLOCK_SIZES}"])


TABLE = (
    cpu.IMPLEMENTATION,
    cuda.IMPLEMENTATION,
    gpu.triton_implementation("nf4_quantize", _against_triton),
    reference.IMPLEMENTATION,
)


def nf4_quantize(w: torch.Tensor, block_size: int = 64, quant_type: str = "nf4") -> tuple[torch.Tensor, torch.Tensor]:
    """w (any shape) fp32|bf16|fp16 -> packed (ceil(numel / 2),) uint8, absmax (ceil(numel / block_size),) fp32. NaN or Inf in w
    make their block's absmax NaN or Inf. TypeError or ValueError names the argument that doesn't fit."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size: expected one of {BLOCK_SIZES}, got {block_size}")
    if w.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"w: expected a floating-point tensor of 16 bits or more, got {w.dtype}")
    code4(quant_type)
    return torch.ops.peftk.nf4_quantize(w, block_size, quant_type)


def quantize_nf4(
    w: torch.Tensor,
    block_size: int = 64,
    double_quant: bool = True,
    nonfinite: str = "raise",
    name: str | None = None,
    quant_type: str = "nf4",
) -> NF4Weight:
    """Quantise a weight of any shape, fp32|bf16|fp16, to 4 bits.

    ``nonfinite="raise"``: NaN or Inf in w is a ValueError that names ``name`` and the first bad index; "keep" quantises the
    other blocks as usual and leaves the block's absmax NaN or Inf (with double_quant that spreads to all of W, so it is refused).
    Temporaries: one fp32 a block (1/64 of the elements) when double quantising, none otherwise.
    """
    if nonfinite not in ("raise", "keep"):
        raise ValueError(f'nonfinite: expected "raise" or "keep", got {nonfinite!r}')
    w = w.detach()
    packed, absmax = nf4_quantize(w, block_size, quant_type)
    if nonfinite == "raise" or double_quant:
        refuse_nonfinite(w, absmax, block_size, name)
    constants = double_quantized(absmax) if double_quant else (absmax, None, None)
    return NF4Weight(packed, *constants, w.shape, w.dtype, block_size, quant_type)


def double_quantized(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """absmax (blocks,) fp32 of a whole weight -> its codes (blocks,) uint8, absmax_scale (ceil(blocks / 256),) and absmax_offset
    () fp32. Temporaries: one fp32 a block."""
    offset = mean_fp64(absmax).to(torch.float32)
    codes, scale = blockwise8_quantize(absmax - offset, NESTED_BLOCK)
    return codes, scale, offset


def mean_fp64(values: torch.Tensor) -> torch.Tensor:
    """The mean of a 1-D tensor, summed in fp64 in an order that does not depend on the number of threads; 0 for an empty one."""
    count, sums = max(values.numel(), 1), values
    while sums.numel() > 1:
        sums = torch.nn.functional.pad(sums, (0, -sums.numel() % 1024)).view(-1, 1024).sum(1, dtype=torch.float64)
    return sums.sum(dtype=torch.float64) / count


def refuse_nonfinite(
    w: torch.Tensor,
    absmax: torch.Tensor,
    block_size: int,
    name: str | None,
    start: int = 0,
    shape: torch.Size | tuple[int, ...] | None = None,
) -> None:
    """ValueError with the first bad index where ``absmax``, of w's blocks, has a NaN or an Inf. w may be the elements from
    ``start`` on of a weight of this ``shape``, whose index is named then."""
    if absmax.is_meta or absmax.numel() == 0 or math.isfinite(absmax.max().item()):
        return
    block = int((~absmax.isfinite()).nonzero()[0])
    values = w.reshape(-1)[block * block_size : (block + 1) * block_size]
    flat = block * block_size + int((~values.isfinite()).nonzero()[0])
    index, rest = [], start + flat
    for size in reversed(shape or w.shape):
        index.insert(0, rest % size)
        rest //= size
    raise ValueError(
        f"{name or 'w'}: expected finite values, got {w.reshape(-1)[flat].item()} at index {tuple(index)}"
        ' (nonfinite="keep" with double_quant=False quantises the other blocks all the same)'
    )


def _run(w: torch.Tensor, block_size: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    return dispatch.select("nf4_quantize", TABLE, w, block_size, quant_type)(w, block_size, quant_type)


def _fake(w: torch.Tensor, block_size: int, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    count = w.numel()
    packed = w.new_empty((count + 1) // 2, dtype=torch.uint8)
    return packed, w.new_empty((count + block_size - 1) // block_size, dtype=torch.float32)


library.define("nf4_quantize(Tensor w, int block_size, str quant_type) -> (Tensor, Tensor)", _run, _fake)
