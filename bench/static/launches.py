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
from peftk.ops import (
    adamw_step,
    adamw_step8,
    blockwise8_dequantize,
    blockwise8_quantize,
    gpu,
    gpu_product,
    nf4_dequantize,
    nf4_quantize,
    philox_dropout,
    regimes,
)
from peftk.ops.gpu_product import Gradient, Outer, Output, Shrink, Weight

OPS = Path(peftk.__file__).parent / "ops"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OTHER_BLOCKS = (32, 512, 4096)  # the extremes, and the one that takes the most registers to quantise
LINEAR = 1024  # n and k of products with a 4-bit weight: enough for a split; LINEAR - 6 only the way by elements takes
COUNTS = (4096, 1001)  # elements: whole tiles of 16-byte accesses; ragged, which Triton compiles another time


# What an op chooses its kernels by, on the GPU that a target is compiled for.
MODELS = {
    "sm_75": gpu.GpuModel("NVIDIA T4 (recorded)", (7, 5), 40),
    "sm_80": gpu.GpuModel("NVIDIA A100 (recorded)", (8, 0), 108),
    "sm_90": gpu.GpuModel("NVIDIA H100 (recorded)", (9, 0), 132),
    "sm_100": gpu.GpuModel("NVIDIA B200 (recorded)", (10, 0), 148),
    "sm_120": gpu.GpuModel("NVIDIA GeForce RTX 5090 (recorded)", (12, 0), 170),
    "gfx942": gpu.GpuModel("AMD Instinct MI300X (recorded)", (9, 4), 304),
    "gfx1100": gpu.GpuModel("AMD Radeon RX 7900 XTX (recorded)", (11, 0), 48),
}


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
        an integer known to be divisible, /1 a pointer that isn't on 16 bytes; (4 x fp32) a tuple of four alike."""
        signature, constants, attributes, _ = triton_aot.specialisation(self.kernel, 80, self.arguments, self.options)

        def part(kind: Any, place: tuple[int, ...]) -> str:
            if isinstance(kind, tuple):
                inside = [part(one, (*place, number)) for number, one in enumerate(kind)]
                same = len(inside) > 3 and len(set(inside)) == 1
                return f"({len(inside)} x {inside[0]})" if same else f"({', '.join(inside)})"
            aligned, pointer = bool(attributes.get(place)), kind.startswith("*")
            suffix = "" if aligned == pointer else "/1" if pointer else "/16"
            return str(constants[place]) if kind == "constexpr" else kind.removeprefix("*") + suffix

        parts = [part(kind, (position,)) for position, kind in enumerate(signature.values())]
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
        """Which regime an op takes, as on that GPU."""
        return MODELS[self.target]

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
    """What the calls of an op launch on a target's GPU, each specialisation once. RuntimeError where a call launches nothing."""
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


def _linear4() -> Iterator[Call]:
    """Every tile and chunks; a list, a split, a low-rank branch; then what tensor cores don't take."""
    for tokens in (16, 32, 64, 128):
        yield from _products("tile", tokens)
    yield from _products("chunks")
    yield from _products("tile", 128, count=3)
    yield from _products("tile", 16, blocks=1 << 20)
    yield from _products("tile", 32, r=16, dropout=0.1)
    yield from _products("tile", 128, r=64, dropout=0.1)
    yield from _products("tile", 128, dtype=torch.float16, nested=False)
    for dtype, k in ((torch.float32, LINEAR), (torch.bfloat16, LINEAR - 6)):
        for tokens in (8, 64):
            yield from _products("simple", tokens, k, dtype)
        yield from _products("chunks", k=k, dtype=dtype)
    yield from _products("simple", 64, LINEAR - 6, torch.float32, r=16, dropout=0.1)


def _products(
    regime: str, tokens: int = 64, k: int = LINEAR, dtype: torch.dtype = torch.bfloat16, count: int = 1, r: int = 0,
    dropout: float = 0.0, blocks: int = 0, nested: bool = True,
) -> Iterator[Call]:  # fmt: skip
    """Forward and backward of ``count`` weights (LINEAR, k), as nf4_linear and nf4_lora_linear launch them in that regime,
    whatever the table says of a GPU; "simple" where a tile has no tensor kernels."""
    m = tokens
    blocks_of_w = -(-LINEAR * k // 64)
    constants = (torch.zeros(blocks_of_w), None, None)
    if nested:
        constants = (torch.zeros(blocks_of_w, dtype=torch.uint8), torch.zeros(-(-blocks_of_w // NESTED_BLOCK)), torch.zeros(()))
    zeros = partial(torch.zeros, dtype=dtype)
    weight = Weight(torch.zeros(-(-LINEAR * k // 2), dtype=torch.uint8), *constants, LINEAR, k, 64, "nf4")
    s, b, a = (zeros(m, r), zeros(LINEAR, r), zeros(r, k)) if r else (None, None, None)
    outputs = [Output(weight, zeros(LINEAR), zeros(m, LINEAR), s, b, 0.5)] * count
    gradients = [Gradient(weight, zeros(m, LINEAR), s, a, dropout, 1)] * count
    kernels = importlib.import_module("peftk.ops.nf4_linear.triton_kernel").KERNELS

    def forced(product: Callable[..., None], *arguments: Any) -> None:
        kind = gpu_product.kind_of(kernels, kernels.model(weight.packed.device), dtype, [weight])
        chosen = "simple" if regime == "tile" and kind == "plain" else regime
        with regimes.forced(regime=chosen, tokens=tokens, blocks=blocks, chunk_mb=1):
            product(kernels, *arguments)

    yield partial(forced, gpu_product.forward, zeros(m, k), outputs)
    yield partial(forced, gpu_product.backward, gradients, zeros(m, k))


def _dropout() -> Iterator[Call]:
    for dtype in DTYPES:
        yield partial(philox_dropout, torch.zeros(COUNTS[0], dtype=dtype), 0.1, 1)
    yield partial(philox_dropout, torch.zeros(COUNTS[0] + 1, dtype=torch.bfloat16)[1:], 0.1, 1)


def _adamw() -> Iterator[Call]:
    """Of one tensor, and of a group; with moments in 32 and in 8 bits."""
    for dtype in DTYPES:
        yield partial(_adamw_with, [torch.zeros(COUNTS[0], dtype=dtype)])
    yield partial(_adamw_with, [torch.zeros(COUNTS[0], dtype=torch.bfloat16)] * 2)


def _adamw_with(tensors: list[torch.Tensor]) -> None:
    moments = [torch.zeros(t.shape) for t in tensors]
    codes, absmax = [torch.zeros(t.shape, dtype=torch.uint8) for t in tensors], [torch.zeros(t.numel() // 256) for t in tensors]
    adamw_step(tensors, tensors, moments, moments, step=1, lr=1e-3)
    adamw_step8(tensors, tensors, codes, codes, absmax, absmax, step=1, lr=1e-3)


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
    "adamw_step": _adamw,
    "nf4_quantize": _quantize4,
    "nf4_dequantize": _dequantize4,
    "nf4_linear": _linear4,
    "blockwise8_quantize": _quantize8,
    "blockwise8_dequantize": _dequantize8,
    "philox_dropout": _dropout,
    "nf4_lora_linear": _thin,
}
