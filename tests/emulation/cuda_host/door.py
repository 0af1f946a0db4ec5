"""The two doors that take the CUDA launchers on the host: HostDoor runs a launch as fibers, PtxDoor hands it to the emulator with
nvcc's sm_80 PTX of the same kernel. Both take the CPU tensors of an op's one test body."""

from __future__ import annotations

import importlib
import os
import re
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.static import nvcc
from emulation.cuda_host import build
from emulation.nested import mapped
from peftk.ops import gpu

TARGET = "sm_80"


@cache
def host_module() -> Any:
    """The ops' host build; with sanitizers where the environment has PEFTK_CUDA_HOST_SANITIZE=1."""
    return build.module(sanitize=os.environ.get("PEFTK_CUDA_HOST_SANITIZE") == "1")


MODEL = gpu.GpuModel("NVIDIA A100 (emulated)", (8, 0), 108)  # which regime an op takes here, as on that GPU


class HostDoor:
    """Threads as fibers, in an order that differs from call to call; ``seed`` shifts them all."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def why_not(self) -> str:
        return build.why_not()

    def reasons_against(self, *tensors: torch.Tensor | None) -> list[str]:
        return [why] if (why := self.why_not()) else []

    def model(self, device: torch.device) -> gpu.GpuModel:
        return MODEL

    def call(self, op: str, *arguments: Any) -> None:
        """``cuda_<op>`` with tensors as addresses and None as 0."""
        numbers = mapped(arguments, lambda tensor: None)
        host_module().set_seed(self.seed + zlib.crc32(repr((op, numbers)).encode()))
        _call(op, arguments)


class PtxDoor:
    """Launches in the emulator; ``reports`` holds those of the last call, (kernel, report) each, ``traffic``: with sectors and
    bank conflicts."""

    def __init__(self, traffic: bool = False) -> None:
        self.traffic = traffic
        self.reports: list[tuple[str, Any]] = []

    def why_not(self) -> str:
        return build.why_not() or nvcc.why_not()

    def reasons_against(self, *tensors: torch.Tensor | None) -> list[str]:
        return [why] if (why := self.why_not()) else []

    def model(self, device: torch.device) -> gpu.GpuModel:
        return MODEL

    def call(self, op: str, *arguments: Any) -> None:
        """``cuda_<op>``; each kernel may touch the bytes of the tensors among the arguments and no others."""
        ptx = importlib.import_module("emulation.ptx")
        memory = ptx.Memory()
        for position, tensor in enumerate(gpu.tensors_in(arguments)):
            if tensor.numel():
                memory.allow(tensor.data_ptr(), _extent(tensor), f"tensor {position} of {op}")
        self.reports = []

        def launch(symbol: str, grid: tuple, block: tuple, shared_bytes: int, parameters: list[bytes]) -> None:
            program = _program(source_of(op))
            report = program.run(symbol, grid, block, shared_bytes, parameters, memory, traffic=self.traffic)
            self.reports.append((symbol, report))

        host_module().set_receiver(launch)
        try:
            _call(op, arguments)
        finally:
            host_module().set_receiver(None)


@cache
def source_of(function: str) -> Path:
    """The file of csrc/ops that defines ``void <function>(…)``."""
    define = re.compile(rf"^void {function}\(", re.MULTILINE)
    (source,) = [p for p in build.op_sources() if p.suffix == ".cu" and define.search(p.read_text())]
    return source


@cache
def _program(source: Path) -> Any:
    return importlib.import_module("emulation.ptx").Program(nvcc.compiled(source, TARGET, "ptx").read_text())


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element of a view to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _call(op: str, arguments: tuple) -> None:
    getattr(host_module(), f"cuda_{op}")(*gpu.wired(arguments), 0)
