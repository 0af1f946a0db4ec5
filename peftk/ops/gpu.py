"""The doors to GPU kernels. ``cuda()`` calls a CUDA function of peftk._C, ``triton()`` launches a ``@triton.jit`` kernel: on the
current stream of the tensors' device, without synchronising. Tests put other doors in their place with ``through``: compiled PTX
in an emulator, CUDA sources on the host, so that ``run`` of an implementation is the same code everywhere."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from peftk.native import native, why_not_native
from peftk.ops.dispatch import Implementation, device_type

LEAST_CAPABILITY = (7, 5)  # Turing: the oldest GPU that the CUDA build and Triton serve
LEAST_TRITON = (3, 4)  # 3.2 has no tl.gather, the compiler of 3.3.1 fails on it


@dataclass(frozen=True)
class GpuModel:
    """What a choice between kernels is made by."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int


@cache
def model_of(index: int) -> GpuModel:
    """Of the CUDA device with that index."""
    facts = torch.cuda.get_device_properties(index)
    return GpuModel(facts.name, (facts.major, facts.minor), facts.multi_processor_count)


def tensors_in(arguments: Sequence[Any]) -> Iterator[torch.Tensor]:
    """Every tensor of nested lists and tuples."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from tensors_in(argument)


def wired(argument: Any) -> Any:
    """An argument as C++ takes it, in nested lists and tuples as well: a tensor's address, 0 for None, a number as it is."""
    kind = type(argument)
    if kind is int or kind is float:
        return argument
    if kind is tuple:
        return tuple([wired(part) for part in argument])
    if kind is list:
        return [wired(part) for part in argument]
    if argument is None:
        return 0
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument


class CudaDoor:
    """peftk._C's CUDA functions, ``cuda_<op>(…, stream)``."""

    def why_not(self) -> str:
        """Why no CUDA kernel can run in this process; empty where one can."""
        module = native()
        if module is None:
            return why_not_native()
        if not hasattr(module, "cuda_devices"):
            return "this build found no nvcc: install peftk again with nvcc on the PATH"
        if not module.cuda_devices():
            return module.cuda_status() or "no device"
        return ""

    def reasons_against(self, *tensors: torch.Tensor | None) -> list[str]:
        """Why a kernel can't take these tensors."""
        return [why] if (why := self.why_not()) else reasons_against_device(*tensors)

    def model(self, device: torch.device) -> GpuModel:
        return model_of(device.index)

    def call(self, op: str, *arguments: Any) -> None:
        """``cuda_<op>`` with tensors as addresses and None as 0, in lists and tuples as well, on the current stream of the first
        tensor's device."""
        device = next(tensors_in(arguments)).device
        with torch.cuda.device(device):
            getattr(native(), f"cuda_{op}")(*wired(arguments), torch.cuda.current_stream(device).cuda_stream)


class TritonDoor:
    """Triton's own launcher."""

    def why_not(self) -> str:
        """Why no Triton kernel can run in this process; empty where one can."""
        if not has_triton():
            return "triton is not installed: pip install 'peftk[gpu]'"
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} sees no GPU"
        version = importlib.import_module("triton").__version__
        if tuple(map(int, version.split(".")[:2])) < LEAST_TRITON:
            return f"triton is {version}, the kernels need {'.'.join(map(str, LEAST_TRITON))}"
        return ""

    def reasons_against(self, *tensors: torch.Tensor | None) -> list[str]:
        """Why a kernel can't take these tensors."""
        return [why] if (why := self.why_not()) else reasons_against_device(*tensors)

    def model(self, device: torch.device) -> GpuModel:
        return model_of(device.index)

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """``kernel[grid](*arguments, **options)`` on the first tensor's device; options are constexprs, num_warps, num_stages."""
        with torch.cuda.device(next(tensors_in(arguments)).device):
            kernel[grid](*arguments, **options)


_doors: dict[str, Any] = {"cuda": CudaDoor(), "triton": TritonDoor()}


def cuda() -> CudaDoor:
    """The door in use."""
    return _doors["cuda"]


def triton() -> TritonDoor:
    """The door in use."""
    return _doors["triton"]


@contextlib.contextmanager
def through(name: str, door: Any) -> Iterator[None]:
    """Inside the ``with``, "cuda" or "triton" kernels are reached through another door."""
    before = _doors[name]
    _doors[name] = door
    try:
        yield
    finally:
        _doors[name] = before


@cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def reasons_against_device(*tensors: torch.Tensor | None) -> list[str]:
    """Why GPU kernels can't take these tensors: one lies elsewhere, or its GPU is too old."""
    for tensor in tensors:
        if tensor is None:
            continue
        if device_type(tensor) != "cuda":
            return [f"a tensor is on {device_type(tensor)}"]
        device = None if tensor.is_meta else tensor.device  # None: the current one
        if (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
            return [f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 7.5"]
    return []


def triton_implementation(
    op: str, reasons_against: Callable[..., list[str]], function: str = "run", kernel: str | None = None
) -> Implementation:
    """A function of peftk/ops/<op>/triton_kernel.py as an implementation; Triton is imported at the first run. ``kernel``: the
    one there that tells which kernel takes the arguments."""

    def of_module(name: str) -> Callable[..., Any]:
        return lambda *arguments: getattr(importlib.import_module(f"peftk.ops.{op}.triton_kernel"), name)(*arguments)

    return Implementation("triton", of_module(function), reasons_against, kernel and of_module(kernel))
