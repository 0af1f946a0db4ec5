"""Which Triton kernels an op launches, and how they are specialised: its public function is called on small CPU tensors while a
recording door stands before Triton, so there is no list of kernels to keep."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import peftk
from bench.static import triton_aot
from peftk.format.dynamic8 import NESTED_BLOCK
from peftk.ops import blockwise8_dequantize, blockwise8_quantize, gpu, nf4_dequantize, nf4_quantize, philox_dropout
from peftk.ops.gpu_product import Outer, Shrink

OPS = Path(peftk.__file__).parent / "ops"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OTHER_BLOCKS = (32, 512, 4096)  # the extremes, and the one that takes the most registers to quantise
CAPABILITIES = {
    **{f"sm_{number}": divmod(number, 10) for number in triton_aot.CUDA_TARGETS},
    **{name: (int(name[3:-2]), int(name[-2])) for name in triton_aot.HIP_TARGETS},
}
COUNTS = (4096, 1001)  # elements: whole tiles of 16-byte accesses; ragged, which Triton compiles another time


@dataclass(frozen=True)
class Launch:
    """One call of a door's ``launch``."""

    kernel: Any  # a @triton.jit function
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel as Triton specialises it, by parameter: ``dequantize<u8, fp32, i32/16, 1024>``. Constants by value; /16 is
        an integer known to be divisible, /1 a pointer that isn't on 16 bytes."""
        signature, constants, attributes, _ = triton_aot.specialisation(self.kernel, 80, self.arguments, self.options)
        parts = []
        for position, kind in enumerate(signature.values()):
            aligned, pointer = bool(attributes.get((position,))), kind.startswith("*")
            suffix = "" if aligned == pointer else "/1" if pointer else "/16"
            parts.append(str(constants[(position,)]) if kind == "constexpr" else kind.removeprefix("*") + suffix)
        return f"{self.kernel.__name__}<{', '.join(parts)}>"

    def compiled(self, target: int | str) -> Any:
        """As triton_aot.compiled."""
        return triton_aot.compiled(self.kernel, target, self.arguments, self.options)


class Recorder(gpu.TritonDoor):
    """A door that writes down what would have been launched on a target; results stay as they were allocated."""

    def __init__(self, target: str = "sm_80") -> None:
        self.target = target
        self.launches: list[Launch] = []

    def why_not(self) -> str:
        return triton_aot.why_not()

    def reasons_against(self, *tensors: torch.Tensor | None) -> list[str]:
        return [why] if (why := self.why_not()) else []

    def model(self, device: torch.device) -> gpu.GpuModel:
        """Which regime an op takes, as on a GPU of that target with an A100's multiprocessors."""
        return gpu.GpuModel(f"{self.target} (recorded)", CAPABILITIES[self.target], 108)

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        self.launches.append(Launch(kernel, grid, arguments, options))


def launched(call: Callable[[], Any], target: str = "sm_80") -> list[Launch]:
    """What ``call`` launches with Triton."""
    recorder = Recorder(target)
    with gpu.through("triton", recorder), peftk.use("triton"):
        call()
    return recorder.launches


@cache
def recorded(op: str, target: str = "sm_80") -> tuple[Launch, ...]:
    """What the calls of an op launch on a target, each specialisation once. RuntimeError where a call launches nothing."""
    if op not in CALLS:
        raise RuntimeError(f"bench/static/launches.py: no calls of {op}, which has Triton kernels")
    by_name: dict[str, Launch] = {}
    for call in CALLS[op]():
        launches = launched(call, target)
        if not launches:
            raise RuntimeError(f"{op}: a call launched no Triton kernel through the door")
        for launch in launches:
            by_name.setdefault(launch.name, launch)
    return tuple(by_name.values())


def ops_with_triton() -> list[str]:
    return sorted(path.parent.name for path in OPS.glob("*/triton_kernel.py"))


# ---- calls that reach every kernel of an op -----------------------------------------------------------------------------------

Call = Callable[[], Any]


def _quantize4() -> Iterator[Call]:
    for count in COUNTS:
        for dtype in DTYPES:
            yield partial(nf4_quantize, torch.zeros(count, dtype=dtype))
    for block_size in OTHER_BLOCKS:
        yield partial(nf4_quantize, torch.zeros(COUNTS[0], dtype=torch.bfloat16), block_size)
    yield partial(nf4_quantize, torch.zeros(COUNTS[0], dtype=torch.bfloat16), quant_type="fp4")


def _dequantize4() -> Iterator[Call]:
    for dtype in DTYPES:
        for count in COUNTS:
            yield from _dequantize4_with(count, 64, dtype)
    for block_size in OTHER_BLOCKS:
        yield from _dequantize4_with(COUNTS[0], block_size, torch.bfloat16)


def _dequantize4_with(count: int, block_size: int, dtype: torch.dtype) -> Iterator[Call]:
    """Double quantised and not."""
    blocks = -(-count // block_size)
    nested = (torch.zeros(blocks, dtype=torch.uint8), torch.zeros(-(-blocks // NESTED_BLOCK)), torch.zeros(()))
    for constants in (nested, (torch.zeros(blocks), None, None)):
        packed = torch.zeros(-(-count // 2), dtype=torch.uint8)
        yield partial(nf4_dequantize, packed, *constants, (count,), block_size, dtype=dtype)


def _quantize8() -> Iterator[Call]:
    for count in COUNTS:
        for dtype in DTYPES:
            yield partial(blockwise8_quantize, torch.zeros(count, dtype=dtype))
    for block_size in OTHER_BLOCKS:
        yield partial(blockwise8_quantize, torch.zeros(COUNTS[0]), block_size)


def _dequantize8() -> Iterator[Call]:
    for dtype in DTYPES:
        for count in COUNTS:
            yield _dequantize8_with(count, 256, dtype)
    for block_size in OTHER_BLOCKS:
        yield _dequantize8_with(COUNTS[0], block_size, torch.float32)


def _dequantize8_with(count: int, block_size: int, dtype: torch.dtype) -> Call:
    codes, absmax = torch.zeros(count, dtype=torch.uint8), torch.zeros(-(-count // block_size))
    return partial(blockwise8_dequantize, codes, absmax, block_size, dtype)


def _dropout() -> Iterator[Call]:
    for dtype in DTYPES:
        yield partial(philox_dropout, torch.zeros(COUNTS[0], dtype=dtype), 0.1, 1)
    yield partial(philox_dropout, torch.zeros(COUNTS[0] + 1, dtype=torch.bfloat16)[1:], 0.1, 1)


def _thin() -> Iterator[Call]:
    """The products beside W: with and without dropout, of few rows and of many, by whatever picks another kernel."""
    fp32, bf16, fp16 = DTYPES
    for dtype, m, c, r, dropout in (
        *((bf16, m, 1024, 16, p) for m in (1, 4096) for p in (0.0, 0.1)),
        *((fp32, m, 1024, 16, p) for m, p in ((1, 0.0), (4096, 0.1))),
        (fp16, 4096, 1024, 16, 0.0),
        (bf16, 4096, 1024, 64, 0.0),
        *((dtype, m, 1024, 128, 0.1) for dtype in (fp32, bf16) for m in (16, 4096)),
        *((bf16, m, 1022, r, 0.1) for m, r in ((1, 1), (4096, 5), (4096, 128))),
        (fp32, 4096, 1022, 128, 0.1),
    ):
        yield partial(_thin_with, dtype, m, c, r, dropout)


def _thin_with(dtype: torch.dtype, m: int, c: int, r: int, dropout: float) -> None:
    """S and dA of a layer, then T and dB, which have no dropout."""
    thin = importlib.import_module("peftk.ops.nf4_lora_linear.triton_thin")
    wide, a, b, s = (torch.zeros(*shape, dtype=dtype) for shape in ((m, c), (r, c), (c, r), (m, r)))
    thin.shrink([Shrink(wide, a.t(), 1.0, dropout, 1, s)] + [Shrink(wide, b, 1.0, 0.0, 0, s)] * (not dropout))
    thin.outer([Outer(s, wide, 1.0, dropout, 1, a)] + [Outer(s, wide, 1.0, 0.0, 0, b.t())] * (not dropout))


CALLS: dict[str, Callable[[], Iterator[Call]]] = {
    "nf4_quantize": _quantize4,
    "nf4_dequantize": _dequantize4,
    "blockwise8_quantize": _quantize8,
    "blockwise8_dequantize": _dequantize8,
    "philox_dropout": _dropout,
    "nf4_lora_linear": _thin,
}
