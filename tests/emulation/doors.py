"""The doors that tests put before GPU kernels (see peftk/ops/gpu.py): each takes the CPU tensors of an op's one test body.

"cuda-host"   the .cu files built by g++, their threads as fibers (cuda_host/)
"cuda-ptx"    the same launchers, but every launch runs nvcc's sm_80 PTX in the emulator (ptx/)
"triton-ptx"  Triton's sm_80 PTX in the emulator
"cuda", "triton"  a GPU: tensors are copied there and back
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch

from peftk.ops import gpu

PLACES = {
    "cuda-host": ("emulation.cuda_host.door", "HostDoor"),
    "cuda-ptx": ("emulation.cuda_host.door", "PtxDoor"),
    "triton-ptx": ("emulation.triton_door", "PtxDoor"),
}


class RealCuda(gpu.CudaDoor):
    """A GPU, for tensors that lie on the CPU."""

    def reasons_against(self, *tensors: torch.Tensor | None) -> list[str]:
        return [why] if (why := self.why_not()) else []

    def call(self, op: str, *arguments: Any) -> None:
        there = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
        super().call(op, *there)
        copy_back(arguments, there)


class RealTriton(gpu.TritonDoor):
    """A GPU, for tensors that lie on the CPU."""

    def reasons_against(self, *tensors: torch.Tensor | None) -> list[str]:
        return [why] if (why := self.why_not()) else []

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        there = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
        super().launch(kernel, grid, *there, **options)
        copy_back(arguments, there)


def copy_back(here: Any, there: Any) -> None:
    """What a kernel may have written."""
    for ours, theirs in zip(here, there, strict=True):
        if isinstance(ours, torch.Tensor) and ours.numel():
            ours.copy_(theirs)


@cache
def door(name: str) -> Any:
    """The door of that name, made once."""
    if name in PLACES:
        module, kind = PLACES[name]
        return getattr(importlib.import_module(module), kind)()
    return {"cuda": RealCuda, "triton": RealTriton}[name]()


def why_not(name: str) -> str:
    """Why it can't be used here; empty where it can."""
    return door(name).why_not()
