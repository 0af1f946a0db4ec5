"""What GPU kernels look 8-bit codes up in: values of codes, and nearest codes of numbers by buckets (csrc/cuda/code_buckets.cuh).

A bucket is the numbers that share their exponent and leading mantissa bits, so few that no bucket has more than one threshold.
Its 32-bit word plus the rest of a number's bits, put just below the top byte, is its code in that top byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from peftk.format.dynamic8 import thresholds8, values8, zero_code8

REST = 24  # bits below a word's top byte


@dataclass(frozen=True)
class Buckets:
    """Of the magnitudes from 2^lowest to 1; smaller ones belong into the first bucket."""

    signed: bool
    lowest: int  # exponent
    shift: int  # bits of fp32 below the leading mantissa bits
    room: int  # words, a power of two

    @property
    def first(self) -> int:
        """Number of the first bucket, among all of fp32."""
        return (127 + self.lowest) << (23 - self.shift)

    def words(self) -> list[int]:
        """rank << REST where no number of the bucket is above a threshold; for the signed code the rank is that among its
        positive values, and a number's sign counts for half of its last place: a tie goes to the lower code."""
        spare = REST - self.shift  # bits of a word below those of a number
        ranks, ends = [0] * self.room, [(1 << REST) - 1] * self.room
        for rank, (at, includes) in enumerate(self.thresholds()):
            bucket = (at >> self.shift) - self.first
            if ends[bucket] != (1 << REST) - 1:
                raise AssertionError(f"two thresholds in bucket {bucket}")
            ends[bucket] = (at << spare & (1 << REST) - 1) + includes
            ranks[bucket + 1 :] = [rank + 1] * (self.room - bucket - 1)
        number = [(self.first + i) << REST for i in range(self.room)]  # which a number's bits still have above the rest
        return [((r << REST) + (1 << REST) - 1 - e - n) % 2**32 for r, e, n in zip(ranks, ends, number, strict=True)]

    def thresholds(self) -> list[tuple[int, int]]:
        """Of each positive value: the largest magnitude's bits that stay below it, and up to which of the lower bits they do."""
        spare, zero = REST - self.shift, zero_code8(self.signed)
        above = thresholds8(self.signed)[zero:].view(torch.int32).tolist()
        if not self.signed:
            return [(bits, (1 << spare) - 1) for bits in above]
        # A negative number passes a threshold at the first magnitude that isn't below the middle: at the middle, if it is one.
        below = thresholds8(True)[:zero].abs().flip(0).view(torch.int32).tolist() + [None]
        return [(up, (1 << spare - 1 if up == down else 1 << spare) - 1) for up, down in zip(above, below, strict=True)]


SIGNED, UNSIGNED = Buckets(True, -22, 17, 2048), Buckets(False, -23, 16, 4096)


@cache
def code_tables(device: torch.device) -> torch.Tensor:
    """(6656,) int32: the values of the signed and of the unsigned code, the buckets of both."""
    values = [values8(signed).view(torch.int32) for signed in (True, False)]
    words = [torch.tensor(buckets.words(), dtype=torch.int64).to(torch.int32) for buckets in (SIGNED, UNSIGNED)]
    return torch.cat([*values, *words]).to(device)
