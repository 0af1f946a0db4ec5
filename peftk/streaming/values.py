"""A weight as floats, a range of its row-major elements at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch

from peftk.format.dynamic8 import NESTED_BLOCK
from peftk.format.nf4 import NF4Weight
from peftk.streaming.safetensors_file import DTYPES
from peftk.streaming.source import Tensor

CHUNK = 1 << 18  # elements that are worked on at a time, with several fp32 copies of them in memory


class Values(Protocol):
    """``flat(start, stop)`` gives elements in ``dtype``, 1-D; start and, but for the last element, stop are multiples of
    ``unit``. ``release`` drops what was kept between two ranges."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    unit: int

    def flat(self, start: int, stop: int) -> torch.Tensor: ...

    def release(self) -> None: ...


def ranges(values: Values, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """What to ask ``flat`` for, in turn: starts that are multiples of ``multiple`` as well."""
    unit, count = math.lcm(values.unit, multiple), math.prod(values.shape)
    step = max(unit, CHUNK // unit * unit)
    return ((start, min(start + step, count)) for start in range(0, count, step))


class FileValues:
    """As a file has them."""

    unit = 1

    def __init__(self, tensor: Tensor):
        self._tensor = tensor
        self.shape, self.dtype = tensor.shape, DTYPES[tensor.dtype]

    def flat(self, start: int, stop: int) -> torch.Tensor:
        size = self.dtype.itemsize
        return self._tensor.read(start * size, stop * size).view(self.dtype)

    def release(self) -> None:
        """Nothing is kept."""


class Transposed:
    """(n, k) of what a file has as (k, n), for Conv1D; all of it is in memory from the first range to ``release``."""

    unit = 1

    def __init__(self, values: Values):
        self._values, self._whole = values, None
        self.shape, self.dtype = tuple(reversed(values.shape)), values.dtype

    def flat(self, start: int, stop: int) -> torch.Tensor:
        if self._whole is None:
            n, k = self.shape
            whole = torch.empty(n, k, dtype=self.dtype)
            rows = max(1, CHUNK // n)
            for first in range(0, k, rows):
                last = min(first + rows, k)
                whole[:, first:last] = self._values.flat(first * n, last * n).view(-1, n).T
            self._whole = whole.view(-1)
        return self._whole[start:stop]

    def release(self) -> None:
        self._whole = None
        self._values.release()


class NF4Values:
    """Decoded to fp32 from bitsandbytes' form; ``tensors`` by their full names. The stored bytes are in memory from the first
    range to ``release``."""

    dtype = torch.float32

    def __init__(self, key: str, tensors: dict[str, Tensor]):
        self._prefix, self._tensors = key.removesuffix("weight"), tensors
        large = (key, f"{key}.absmax", f"{key}.nested_absmax")
        seen = {name: _on_meta(tensor) if name in large else _whole(tensor) for name, tensor in tensors.items()}
        self.facts = NF4Weight.from_state_dict(seen, self._prefix)  # checked against each other; sizes and kinds, no bytes
        self.shape = tuple(self.facts.shape)
        self.unit = NESTED_BLOCK * self.facts.block_size
        self._w4: NF4Weight | None = None

    def flat(self, start: int, stop: int) -> torch.Tensor:
        if self._w4 is None:
            self._w4 = NF4Weight.from_state_dict({name: _whole(t) for name, t in self._tensors.items()}, self._prefix)
        return part_of(self._w4, start, stop).dequantize(self.dtype)

    def release(self) -> None:
        self._w4 = None


def part_of(w4: NF4Weight, start: int, stop: int, packed: torch.Tensor | None = None) -> NF4Weight:
    """Elements of a 4-bit weight, 1-D, around its own bytes, or around ``packed``, those of the range; start is a multiple of a
    block of its constants' blocks."""
    block, scale = w4.block_size, w4.absmax_scale
    blocks = slice(start // block, -(-stop // block))
    outer = slice(blocks.start // NESTED_BLOCK, -(-blocks.stop // NESTED_BLOCK))
    packed = w4.packed[start // 2 : (stop + 1) // 2] if packed is None else packed
    constants = (w4.absmax[blocks], None if scale is None else scale[outer], w4.absmax_offset)
    return NF4Weight(packed, *constants, (stop - start,), w4.dtype, block, w4.quant_type)


def _whole(tensor: Tensor) -> torch.Tensor:
    return tensor.read(0, tensor.nbytes).view(DTYPES[tensor.dtype]).view(tensor.shape)


def _on_meta(tensor: Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta")
