"""A torch tensor over memory that somebody else keeps. Host memory and a GPU's differ here, and nowhere else in the room."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch


class _OnGpu:
    """What torch takes a tensor from (CUDA array interface, version 2), and what keeps the owner alive."""

    def __init__(self, owner: Any, address: int, nbytes: int) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 2}


def tensor_over(owner: Any, address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous tensor, with a storage of its own, over the bytes at ``address``; it holds ``owner`` while it lives."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type == "cuda":
        flat = torch.as_tensor(_OnGpu(owner, address, nbytes), device=device)
    else:
        buffer = (ctypes.c_ubyte * nbytes).from_address(address)
        buffer.owner = owner
        flat = torch.frombuffer(buffer, dtype=torch.uint8)
    return flat.view(dtype).view(shape)
