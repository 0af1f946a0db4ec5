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

from emulation.nested import mapped
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

    def model(self, device: torch.device) -> gpu.GpuModel:
        return gpu.model_of(torch.cuda.current_device())

    def call(self, op: str, *arguments: Any) -> None:
        there = mapped(arguments, on_gpu)
        super().call(op, *there)
        copy_back(arguments, there)


class RealTriton(gpu.TritonDoor):
    """A GPU, for tensors that lie on the CPU."""

    def reasons_against(self, *tensors: torch.Tensor | None) -> list[str]:
        return [why] if (why := self.why_not()) else []

    def model(self, device: torch.device) -> gpu.GpuModel:
        return gpu.model_of(torch.cuda.current_device())

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        there = mapped(arguments, on_gpu)
        super().launch(kernel, grid, *there, **options)
        copy_back(arguments, there)


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, which kernels are told."""
    if not tensor.numel():
        return tensor.cuda()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent,), (1,)).cuda().as_strided(tensor.shape, tensor.stride())


def copy_back(here: Any, there: Any) -> None:
    """What a kernel may have written."""
    for ours, theirs in zip(gpu.tensors_in(here), gpu.tensors_in(there), strict=True):
        if ours.numel():
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
