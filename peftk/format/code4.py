"""The 4-bit codes, once in Python: NF4 (Dettmers et al. 2023, QLoRA, appendix E) and bitsandbytes' FP4.

A block's code is ``code_of_rank[number of thresholds strictly below x * (1 / absmax)]``. The thresholds are bitsandbytes' CUDA
literals, rounded once to fp32: four of them lie one ulp beside the midpoints of neighbouring values.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache

import torch

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Code4:
    """One 4-bit code: 16 values by stored code, 15 ascending thresholds, the code of each rank."""

    number: int  # how peftk._C calls it
    values: tuple[float, ...]  # (16,) in units of the block's absmax
    thresholds: tuple[float, ...]  # (15,)
    code_of_rank: tuple[int, ...]  # (16,)
    code_of_zero: int  # of an all-zero block and of the nibble that pads an odd count
    int8_scale: int  # the table in 8 bits: values * int8_scale, rounded


NF4 = Code4(
    number=0,
    values=(
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    thresholds=tuple(
        float.fromhex(t)
        for t in (
            "-0x1.b239b2p-1", "-0x1.38a4ep-1", "-0x1.d709p-2", "-0x1.5bd4ecp-2", "-0x1.e079d8p-3", "-0x1.1a7178p-3",
            "-0x1.74f0e2p-5", "0x1.45f5fep-5", "0x1.ec90c6p-4", "0x1.a0cfcp-3", "0x1.2b05a8p-2", "0x1.8ea7f2p-2",
            "0x1.00da06p-1", "0x1.491b5ep-1", "0x1.b913b2p-1",
        )
    ),
    code_of_rank=tuple(range(16)),
    code_of_zero=7,
    # Gaussian weights in blocks of 64: the rounding is 0.47 % of their norm (with 127: 0.59 %), and the mean of it, which adds up
    # where x has a mean, 0.02 % (0.10 %). Better than 127 for Laplace and Student weights and for huge blocks, too.
    int8_scale=112,
)  # fmt: skip


def _fp32(value: float) -> float:
    """Rounded as a C compiler rounds the literal. Without torch, whose default device and dtype are the user's."""
    return struct.unpack("f", struct.pack("f", value))[0]


# The rule is |x| > t with the sign apart. For negative x that is x < -t, so the threshold on that side is the number just
# below -t; between code 8 (x < 0) and code 0 it is the number just below zero.
FP4 = Code4(
    number=1,
    # Both zeros are +0, as in bitsandbytes' quant_map.
    values=tuple(_fp32(sign * v / 12 + 0.0) for sign in (1, -1) for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)),
    thresholds=(
        *(
            float.fromhex(t)
            for t in (
                "-0x1.aaaaacp-1", "-0x1.2aaaa2p-1", "-0x1.aaaaaep-2", "-0x1.2aaaacp-2", "-0x1.aaaaacp-3", "-0x1.600002p-4",
                "-0x1.555574p-9", "-0x1p-149",
            )
        ),
        *map(_fp32, (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)),
    ),
    code_of_rank=(11, 10, 13, 12, 15, 14, 9, 8, 0, 1, 6, 7, 4, 5, 2, 3),
    code_of_zero=0,
    int8_scale=120,  # every value but 0.0625 / 12 is then an integer
)  # fmt: skip

CODES4 = {"nf4": NF4, "fp4": FP4}


def code4(quant_type: str) -> Code4:
    """The code named ``quant_type``; ValueError for another name."""
    if quant_type not in CODES4:
        raise ValueError(f"quant_type: expected one of {sorted(CODES4)}, got {quant_type!r}")
    return CODES4[quant_type]


@cache
def values4(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 values, fp32, on ``device``."""
    return torch.tensor(code4(quant_type).values, dtype=torch.float32, device=device)
