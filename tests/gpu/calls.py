"""Calls of the ops that have GPU kernels: tensors on the CPU, which a test moves, and what to do with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from numerics import row_scaled

import peftk
from bench.gpu.cases import why_not
from peftk.format.code4 import BLOCK_SIZES, CODES4
from peftk.ops import blockwise8_dequantize, blockwise8_quantize, nf4_dequantize, nf4_quantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (0, 4), (129,), (33, 33), (3, 5, 7), (5, 80), (7, 96), (2, 4304), (65, 1030))
BLOCKS8 = (1, 7, 64, 256, 2048, 4096)
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Place:
    """Where a test body runs, and by which implementation."""

    device: str
    implementation: str

    def __str__(self) -> str:
        return self.implementation if self.device == "cuda" else f"{self.device}-{self.implementation}"

    def why_not(self, op: str) -> str:
        """Why this op can't run here; empty where it can."""
        return why_not([op], self.implementation)

    def run(self, call: Call, tensors: Tensors | None = None) -> Tensors:
        """The call's results by the implementation, on the call's own tensors, moved there, or on these."""
        tensors = self.move(call) if tensors is None else tensors
        with peftk.use(self.implementation):
            return call.run(*tensors)

    def move(self, call: Call) -> Tensors:
        """Copies of the call's tensors."""
        return tuple(t.detach().clone().to(self.device) for t in call.tensors)


REFERENCE, CPU = Place("cpu", "reference"), Place("cpu", "cpu")
GPU = (Place("cuda", "cuda"), Place("cuda", "triton"))


@dataclass(frozen=True)
class Call:
    """``run(*tensors)`` -> every result, flat."""

    what: str
    tensors: Tensors
    run: Callable[..., Tensors]

    def expected(self) -> Tensors:
        """By the CPU kernels."""
        return self.run(*self.tensors)


def differing(results: Tensors, expected: Tensors) -> str:
    """What differs, in any bit; empty where nothing does."""
    if len(results) != len(expected):
        return f"{len(results)} results, expected {len(expected)}"
    for i, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        if result.shape != wanted.shape or result.dtype != wanted.dtype:
            return f"result {i}: {result.dtype} {tuple(result.shape)}, expected {wanted.dtype} {tuple(wanted.shape)}"
        ours, theirs = bits(result), bits(wanted)
        if not torch.equal(ours, theirs):
            first = int((ours != theirs).nonzero()[0])
            values = result.cpu().reshape(-1)[first].item(), wanted.reshape(-1)[first].item()
            return f"result {i}, element {first} of {ours.numel()}: {values[0]!r}, expected {values[1]!r}"
    return ""


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Flat, on the CPU, as integers: NaN equals itself, -0 is not 0."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().reshape(-1).contiguous().view(sizes[tensor.element_size()])


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Row-scaled; among many rows some of zeros, of tiny and of huge numbers."""
    w = row_scaled(*shape)
    if shape[0] > 8:
        w[1], w[2], w[4] = 0, w[2] * 1e-30, w[4] * 1e30
    return w.to(dtype).nan_to_num(posinf=6e4, neginf=-6e4)


# ---- one call of an op ------------------------------------------------------------------------------------------------------


def nf4_dequantize_call(
    shape: tuple[int, ...] = (97, 1034),
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 64,
    quant_type: str = "nf4",
    double_quant: bool = True,
    into: bool = False,
) -> Call:
    """``into``: by out=."""
    w4 = peftk.quantize_nf4(row_scaled(*shape), block_size, double_quant, quant_type=quant_type)
    tensors = tuple(t for t in w4.tensors() if t is not None)

    def run(packed: torch.Tensor, absmax: torch.Tensor, *nested: torch.Tensor) -> Tensors:
        out = torch.empty(shape, dtype=dtype, device=packed.device) if into else None
        scale, offset = nested or (None, None)
        return (nf4_dequantize(packed, absmax, scale, offset, shape, block_size, quant_type, dtype, out),)

    constants = "double quantised" if double_quant else "fp32 constants"
    what = f"{quant_type} {shape} to {dtype}, blocks of {block_size}, {constants}, {'out=' if into else 'fresh'}"
    return Call(what, tensors, run)


def nf4_quantize_call(
    shape: tuple[int, ...] = (97, 1034), dtype: torch.dtype = torch.bfloat16, block_size: int = 64, quant_type: str = "nf4"
) -> Call:
    w = weight(*shape, dtype=dtype)
    return Call(f"{shape} {dtype}, blocks of {block_size}", (w,), lambda w: nf4_quantize(w, block_size, quant_type))


def blockwise8_quantize_call(
    shape: tuple[int, ...] = (97, 1034), dtype: torch.dtype = torch.float32, block_size: int = 256, signed: bool = True
) -> Call:
    x = weight(*shape, dtype=dtype)
    x = x if signed else x.abs()
    return Call(f"{shape} {dtype}, blocks of {block_size}", (x,), lambda x: blockwise8_quantize(x, block_size, signed))


def blockwise8_dequantize_call(
    shape: tuple[int, ...] = (97, 1034), dtype: torch.dtype = torch.float32, block_size: int = 256, signed: bool = True
) -> Call:
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    absmax = torch.exp(2 * torch.randn(-(-codes.numel() // block_size)))
    what = f"{shape} to {dtype}, blocks of {block_size}, {'signed' if signed else 'unsigned'}"
    return Call(what, (codes, absmax), lambda *parts: (blockwise8_dequantize(*parts, block_size, dtype, signed),))


TYPICAL: dict[str, Callable[..., Call]] = {
    "blockwise8_dequantize": blockwise8_dequantize_call,
    "blockwise8_quantize": blockwise8_quantize_call,
    "nf4_dequantize": nf4_dequantize_call,
    "nf4_quantize": nf4_quantize_call,
}


def transposed(call: Call) -> Call:
    """The same op on its first tensor's transpose, which isn't contiguous."""
    first, *others = call.tensors
    return Call(f"{call.what}, transposed", (first, *others), lambda t, *rest: call.run(t.T, *rest))


def matrix(op: str) -> Iterator[Call]:
    """Every dtype with every shape, every dtype with every block size, and the op's own switches."""
    make = TYPICAL[op]
    yield from (make(shape, dtype) for shape, dtype in itertools.product(SHAPES, DTYPES))
    blocks = BLOCK_SIZES if op.startswith("nf4") else BLOCKS8
    yield from (make((9, 1030), dtype, block) for dtype, block in itertools.product(DTYPES, blocks))
    if op == "nf4_dequantize":
        switches = itertools.product(CODES4, (True, False), (True, False), DTYPES)
        yield from (make((9, 1030), dtype, 64, *switch) for *switch, dtype in switches)
    elif op == "nf4_quantize":
        yield from (make((9, 1030), dtype, 64, kind) for kind, dtype in itertools.product(CODES4, DTYPES))
    else:
        yield from (make((9, 1030), dtype, 64, signed) for signed, dtype in itertools.product((True, False), DTYPES))
    if op.endswith("_quantize"):
        yield from (transposed(make((33, 70), dtype)) for dtype in DTYPES)


# ---- more elements than 32 bits count ---------------------------------------------------------------------------------------

PERIOD = 64 * 10007  # elements: a wrapped index lands elsewhere in it, since it divides no power of 2
EDGE = 4096  # elements at each place that is looked at; of whole blocks


@dataclass(frozen=True)
class Big:
    """A call of so many elements, made on a device, and the same op on a window of it."""

    nbytes: int  # all of it, results too
    tensors: Callable[[str], Tensors]
    run: Callable[..., Tensors]  # run(elements, *tensors)
    window: Callable[[Tensors, int, int], Tensors]  # of the inputs: elements first to last
    result: Callable[[Tensors, int, int], Tensors]  # of the results


def repeated(tile: torch.Tensor, count: int, device: str) -> torch.Tensor:
    return tile.to(device).repeat(-(-count // tile.numel()))[:count]


def _halves(t: torch.Tensor, first: int, last: int) -> torch.Tensor:
    return t[first // 2 : (last + 1) // 2]


def _blocks(t: torch.Tensor, block: int, first: int, last: int) -> torch.Tensor:
    return t[first // block : -(-last // block)]


def _constants(count: int, block: int, device: str) -> torch.Tensor:
    return repeated(torch.rand(10007) + 0.5, -(-count // block), device)


def big(op: str, count: int) -> Big:
    """Of ``count`` elements, bf16 where they are floats."""
    block = 64 if op.startswith("nf4") else 256
    codes = torch.randint(0, 256, (PERIOD,), dtype=torch.uint8)
    constant = 4 / block
    if op == "nf4_dequantize":
        return Big(
            round(count * (2.5 + constant)),
            lambda device: (repeated(codes, (count + 1) // 2, device), _constants(count, block, device)),
            lambda count, *parts: (nf4_dequantize(*parts, None, None, (count,), block, dtype=torch.bfloat16),),
            lambda parts, first, last: (_halves(parts[0], first, last), _blocks(parts[1], block, first, last)),
            lambda results, first, last: (results[0][first:last],),
        )
    if op == "blockwise8_dequantize":
        return Big(
            round(count * (3 + constant)),
            lambda device: (repeated(codes, count, device), _constants(count, block, device)),
            lambda count, codes, absmax: (blockwise8_dequantize(codes, absmax, block, torch.bfloat16),),
            lambda parts, first, last: (parts[0][first:last], _blocks(parts[1], block, first, last)),
            lambda results, first, last: (results[0][first:last],),
        )
    quantize, cut = (nf4_quantize, _halves) if op == "nf4_quantize" else (blockwise8_quantize, lambda t, *ends: t[slice(*ends)])
    return Big(
        round(count * (2 + constant + (0.5 if op == "nf4_quantize" else 1))),
        lambda device: (repeated(torch.randn(PERIOD).bfloat16(), count, device),),
        lambda count, x: quantize(x, block),
        lambda parts, first, last: (parts[0][first:last],),
        lambda results, first, last: (cut(results[0], first, last), _blocks(results[1], block, first, last)),
    )
