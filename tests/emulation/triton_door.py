"""Triton's kernels without a GPU: compiled for sm_80 as its launcher would, the PTX executed by the emulator on CPU tensors."""

from __future__ import annotations

import re
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bench.static import triton_aot
from emulation.ptx import Memory, Program
from peftk.ops import gpu

PACKED = {"i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q", "fp32": "<f"}  # Triton's types as struct's


class PtxDoor:
    """Stands where gpu.TritonDoor stands. ``reports`` are those of the emulator for the last launches, the newest last."""

    def __init__(self, target: int = 80, traffic: bool = False) -> None:
        self.target = target  # 80 is what the emulator knows; 75 has nothing that it doesn't
        self.traffic = traffic  # whether reports tell sectors and bank conflicts
        self.compiled: dict[str, tuple[Any, Any, int]] = {}  # by kernel and specialisation: program, metadata, parameters
        self.reports: deque[Any] = deque(maxlen=16)

    def why_not(self) -> str:
        """Why nothing can be emulated here; empty where it can."""
        return triton_aot.why_not()

    def reasons_against(self, *tensors: torch.Tensor | None) -> list[str]:
        """Why a kernel can't take these tensors."""
        elsewhere = [f"a tensor is on {t.device}" for t in tensors if t is not None and not t.is_cpu]
        return [why] if (why := self.why_not()) else elsewhere[:1]

    def model(self, device: torch.device) -> gpu.GpuModel:
        """Which regime an op takes here, as on that GPU."""
        return gpu.GpuModel("NVIDIA A100 (emulated)", (8, 0), 108)

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """``kernel[grid](*arguments, **options)``. A Fault is raised for any access outside the tensors' own bytes."""
        facts = triton_aot.specialisation(kernel, self.target, arguments, options)
        key = f"{kernel.cache_key} {facts}"
        if key not in self.compiled:
            made = triton_aot.compiled(kernel, self.target, arguments, options)
            self.compiled[key] = Program(made.asm["ptx"]), made.metadata, declared(made.asm["ptx"], made.metadata.name)
        program, metadata, count = self.compiled[key]
        parameters = laid_out(facts[0], arguments, count)
        memory = Memory()
        for name, argument in zip(kernel.arg_names, arguments, strict=False):
            for value in gpu.tensors_in([argument]):
                if value.numel():
                    memory.allow(value.data_ptr(), extent(value), name)
        threads = (32 * metadata.num_warps, 1, 1)
        blocks = tuple((*grid, 1, 1)[:3])
        launch = (metadata.name, blocks, threads, metadata.shared, parameters, memory)
        self.reports.append(program.run(*launch, traffic=self.traffic, one_writer=True))


def declared(ptx: str, entry: str) -> int:
    """How many parameters an entry has: the kernel's own, then Triton's pointers to global and to profiling scratch."""
    (parameters,) = re.findall(rf"\.entry {re.escape(entry)}\(([^)]*)\)", ptx)
    return parameters.count(".param")


def extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element of a view to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def laid_out(signature: dict[str, Any], arguments: Sequence[Any], count: int) -> list[bytes]:
    """``count`` parameters as bytes: the arguments that aren't compiled in, then null for the scratch that no kernel uses."""
    wired = [packed(kind, value) for kind, value in flat(tuple(signature.values()), arguments) if kind != "constexpr"]
    return wired + [bytes(8)] * (count - len(wired))


def flat(kinds: Sequence[Any], arguments: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Types with their arguments, those of a tuple one after the other."""
    for kind, value in zip(kinds, arguments, strict=False):
        if isinstance(kind, tuple):
            yield from flat(kind, value)
        else:
            yield kind, value


def packed(kind: str, value: Any) -> bytes:
    return struct.pack("<Q", value.data_ptr()) if kind.startswith("*") else struct.pack(PACKED[kind], value)
