"""What is timed on a GPU, by op: ours by every implementation that the device has, beside the peers.

Weights are made and quantised on the CPU, whose kernels are held against the definition, so that no kernel judges itself. A new
op is a function here and a line in CASES.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import peftk
from bench import linear, peers
from bench.gpu.device import Device
from bench.gpu.measure import Forced, GpuCase
from bench.linear import NAMES, RANK, Layer, Step
from bench.measure import Candidate, Work, relative_error
from bench.ops import bench_adamw_step as adamw
from bench.ops.bench_nf4_dequantize import decode_fp64
from peftk.format.dynamic8 import STATE_BLOCK, values8, zero_code8
from peftk.native import why_not_native
from peftk.ops import adamw_step, adamw_step8, blockwise8_dequantize, blockwise8_quantize, gpu, nf4_quantize

SHAPES = ((4096, 4096), (8192, 8192), (11008, 4096))  # n, k
SMALL, CALLS = (256, 256), 20  # a call that is over before Python has queued the next; calls on end
BLOCK = 256  # of the 8-bit code
FORWARD_ROWS = {torch.bfloat16: (1, 4, 16, 128, 512, 2048), torch.float16: (1, 16, 512)}
TRAINING_ROWS = (16, 128, 512, 2048)
LAYER = ((4096, 4096),)  # of the linear ops
Shapes = Sequence[tuple[int, int]]
Error = Callable[[Any], float]


def ours(device: Device, ops: Sequence[str], run: peers.Run, error: Error) -> list[Forced]:
    """``run``, which calls these ops, by each implementation; where an op doesn't have it, the reason."""
    reasons = [(name, why_not(ops, name)) for name in device.implementations]
    return [Forced(f"peftk {name}", None if why else run, error, note=why, implementation=name) for name, why in reasons]


def why_not(ops: Sequence[str], name: str) -> str:
    """Why these ops can't run by that implementation; empty where they can."""
    for op in ops:
        has = [implementation.name for implementation in importlib.import_module(f"peftk.ops.{op}").TABLE]
        if name not in has:
            return f"{op} has no such implementation (it has {', '.join(has)})"
    doors = {"cuda": gpu.cuda().why_not, "triton": gpu.triton().why_not, "cpu": why_not_native}
    return doors[name]() if name in doors else ""


def protocols(device: Device, name: str, work: Work, small: bool, candidates: Sequence[Candidate]) -> Iterator[GpuCase]:
    """From memory; or of a small one, calls on end from Python and in a graph."""
    count = len(device.implementations)
    if not small:
        yield GpuCase(f"{name}, from memory", work, candidates, ours=count)
        return
    yield GpuCase(f"{name}, {CALLS} calls on end", work, candidates, ours=count, calls=CALLS)
    yield GpuCase(f"{name}, {CALLS} calls in a CUDA graph", work, candidates, ours=count, calls=CALLS, graph=True)


def random_weight(device: Device, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Gaussian, each row at a scale of its own."""
    return torch.randn(shape).mul_(torch.randn(shape[0], 1).exp_()).to(device.place, dtype)


def dense_copy(w: torch.Tensor) -> Candidate:
    """The yardstick: W, written out, read and written by torch."""
    out = torch.zeros_like(w)
    return Candidate("torch dense copy", lambda: out.copy_(w), work=Work(w.nbytes, w.nbytes))


# ---- codes and constants ----------------------------------------------------------------------------------------------------


def nf4_dequantize_cases(device: Device, shapes: Shapes = SHAPES) -> Iterator[GpuCase]:
    for shape, dtype in itertools.product(shapes, (torch.bfloat16, torch.float16)):
        yield from nf4_dequantize_case(device, shape, dtype)
    yield from nf4_dequantize_case(device, shapes[0], torch.bfloat16, double_quant=False)
    yield from nf4_dequantize_case(device, SMALL, torch.bfloat16)


def nf4_dequantize_case(
    device: Device, shape: tuple[int, int], dtype: torch.dtype, double_quant: bool = True
) -> Iterator[GpuCase]:
    """W in dtype, fresh."""
    w = random_weight(device, shape, dtype)
    w4 = peftk.quantize_nf4(w.cpu(), double_quant=double_quant).to(device.place)
    truth = decode_fp64(w4)

    def error(result: torch.Tensor) -> float:
        return relative_error(result, truth)

    candidates = [
        *ours(device, ["nf4_dequantize"], w4.dequantize, error),
        peers.candidate("bitsandbytes", [peers.BITSANDBYTES], lambda: peers.bnb_dequantize_4bit(w4), error),
        dense_copy(w),
    ]
    name = f"{shape[0]}x{shape[1]} to {NAMES[dtype]}, {constants(double_quant)}"
    return protocols(device, name, Work(w4.nbytes, w.nbytes), shape == SMALL, candidates)


def nf4_quantize_cases(device: Device, shapes: Shapes = SHAPES) -> Iterator[GpuCase]:
    for shape, dtype in itertools.product(shapes, (torch.bfloat16, torch.float16)):
        yield from nf4_quantize_case(device, shape, dtype)
    yield from nf4_quantize_case(device, shapes[0], torch.bfloat16, double_quant=True)
    yield from nf4_quantize_case(device, SMALL, torch.bfloat16)


def nf4_quantize_case(
    device: Device, shape: tuple[int, int], dtype: torch.dtype, double_quant: bool = False
) -> Iterator[GpuCase]:
    """The op; where double quantised, peftk.quantize_nf4 whole, which also looks for NaN and so waits for the GPU. Error: of W
    decoded again."""
    w = random_weight(device, shape, dtype)
    stored = peftk.quantize_nf4(w.cpu(), double_quant=double_quant).nbytes

    def error(w4: peftk.NF4Weight) -> float:
        with peftk.use("reference"):
            return relative_error(w4.dequantize(torch.float32), w.double())

    def error_of_parts(parts: tuple[torch.Tensor, torch.Tensor]) -> float:
        return error(peftk.NF4Weight(*parts, None, None, w.shape, w.dtype))

    if double_quant:
        mine = ours(device, ["nf4_quantize", "blockwise8_quantize"], lambda: peftk.quantize_nf4(w), error)
    else:
        mine = ours(device, ["nf4_quantize"], lambda: nf4_quantize(w), error_of_parts)
    bitsandbytes = peers.candidate(
        "bitsandbytes",
        [peers.BITSANDBYTES],
        lambda: peers.bnb_quantize_4bit(w, double_quant),
        lambda result: error(peers.bnb_as_nf4_weight(*result)),
    )
    name = f"{shape[0]}x{shape[1]} {NAMES[dtype]}, {constants(double_quant)}"
    return protocols(device, name, Work(w.nbytes, stored), shape == SMALL, [*mine, bitsandbytes, dense_copy(w)])


def constants(double_quant: bool) -> str:
    return "double quantised" if double_quant else "fp32 constants"


def blockwise8_quantize_cases(device: Device, shapes: Shapes = SHAPES) -> Iterator[GpuCase]:
    for shape, dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        yield from blockwise8_quantize_case(device, shape, dtype)
    yield from blockwise8_quantize_case(device, SMALL, torch.float32)


def blockwise8_quantize_case(device: Device, shape: tuple[int, int], dtype: torch.dtype) -> Iterator[GpuCase]:
    """Error: of x decoded again."""
    x = random_weight(device, shape, dtype)

    def error(codes: torch.Tensor, absmax: torch.Tensor) -> float:
        return relative_error(decode8_fp64(codes, absmax), x.double())

    candidates = [
        *ours(device, ["blockwise8_quantize"], lambda: blockwise8_quantize(x, BLOCK), lambda result: error(*result)),
        peers.candidate(
            "bitsandbytes",
            [peers.BITSANDBYTES],
            lambda: peers.bnb_quantize_blockwise(x, BLOCK),
            lambda result: error(result[0], result[1].absmax),
        ),
        dense_copy(x),
    ]
    work = Work(x.nbytes, x.numel() + 4 * x.numel() // BLOCK)
    return protocols(device, f"{shape[0]}x{shape[1]} {NAMES[dtype]}", work, shape == SMALL, candidates)


def blockwise8_dequantize_cases(device: Device, shapes: Shapes = SHAPES) -> Iterator[GpuCase]:
    for shape in (*shapes, SMALL):
        yield from blockwise8_dequantize_case(device, shape)


def blockwise8_dequantize_case(device: Device, shape: tuple[int, int]) -> Iterator[GpuCase]:
    """To fp32, fresh."""
    x = random_weight(device, shape, torch.float32)
    codes, absmax = (part.to(device.place) for part in blockwise8_quantize(x.cpu(), BLOCK))
    truth = decode8_fp64(codes, absmax)

    def error(result: torch.Tensor) -> float:
        return relative_error(result, truth)

    candidates = [
        *ours(device, ["blockwise8_dequantize"], lambda: blockwise8_dequantize(codes, absmax, BLOCK), error),
        peers.candidate(
            "bitsandbytes", [peers.BITSANDBYTES], lambda: peers.bnb_dequantize_blockwise(codes, absmax, BLOCK), error
        ),
        dense_copy(x),
    ]
    work = Work(codes.nbytes + absmax.nbytes, x.nbytes)
    return protocols(device, f"{shape[0]}x{shape[1]} to fp32", work, shape == SMALL, candidates)


def decode8_fp64(codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """x in fp64 arithmetic."""
    values = values8(True, codes.device).double()[codes.long()]
    return (values.view(-1, BLOCK) * absmax.double()[:, None]).view(codes.shape)


# ---- products ---------------------------------------------------------------------------------------------------------------


def with_ours(device: Device, op: str, candidates: Sequence[Candidate]) -> list[Candidate]:
    """bench.linear's candidates, the first of which is ours by whatever implementation, with ours by each."""
    first, *others = candidates
    return [*ours(device, [op], first.run, first.error), *others]


def nf4_linear_cases(device: Device, shapes: Shapes = LAYER) -> Iterator[GpuCase]:
    """y = x W^T."""
    for shape, (dtype, rows) in itertools.product(shapes, FORWARD_ROWS.items()):
        n, k = shape
        layer = Layer.random(n, k, dtype).to(device.place)
        for m in rows:
            x = torch.randn(m, k).to(device.place, dtype)
            work = linear.forward_work(x, n, layer.w4.nbytes)
            candidates = with_ours(device, "nf4_linear", linear.forward_candidates([layer], x, int4=False, packed=False))
            yield from protocols(device, f"m={m}, {NAMES[dtype]}, {n}x{k}, forward", work, False, candidates)


def nf4_lora_linear_cases(device: Device, shapes: Shapes = LAYER) -> Iterator[GpuCase]:
    """A QLoRA layer inside a model: y, dx, dA, dB."""
    for n, k in shapes:
        layer = Layer.random(n, k, torch.bfloat16).to(device.place)
        for m in TRAINING_ROWS:
            step = Step.random(m, n, k, torch.bfloat16).to(device.place)
            name = f"m={m}, bf16, {n}x{k}, r={RANK}, forward + backward"
            candidates = with_ours(device, "nf4_lora_linear", linear.training_candidates(layer, step))
            yield from protocols(device, name, step.work(layer.w4.nbytes), False, candidates)


# ---- optimizers -------------------------------------------------------------------------------------------------------------


def adamw_step_cases(device: Device, shapes: Shapes = ((16384, 4096),)) -> Iterator[GpuCase]:
    """A step with moments in fp32 and in 8 bits, of large fp32 and bf16 parameters and of the small ones of a LoRA. The peers'
    time is that of ``optimizer.step()``."""
    for dtype, bits in itertools.product((torch.float32, torch.bfloat16), (32, 8)):
        name = f"{'x'.join(map(str, shapes[0]))} {NAMES[dtype]}, moments in {bits} bits, from memory"
        yield adamw_step_case(device, name, shapes, dtype, bits)
    for bits in (32, 8):
        name = f"{len(adamw.LORA)} tensors of a LoRA, moments in {bits} bits, {CALLS} calls on end"
        yield adamw_step_case(device, name, adamw.LORA, torch.float32, bits, CALLS)


def adamw_step_case(device: Device, name: str, shapes: Shapes, dtype: torch.dtype, bits: int, calls: int = 1) -> GpuCase:
    """Ours beside bitsandbytes' step of the same bits, torch's fused one with moments of the parameters' dtype, a copy."""
    count, width = sum(rows * columns for rows, columns in shapes), dtype.itemsize
    work, dense = (Work((2 * width + state) * count, (width + state) * count) for state in (bits // 4, 2 * width))

    def parameters() -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(torch.randn(shape).to(device.place, dtype)) for shape in shapes]
        for parameter in made:
            parameter.grad = torch.randn_like(parameter)
        return made

    def bitsandbytes() -> peers.Run:
        optim = importlib.import_module("bitsandbytes.optim")
        return (optim.AdamW32bit if bits == 32 else optim.AdamW8bit)(parameters(), **adamw.OPTIONS).step

    mine = [(who, why_not(["adamw_step"], who)) for who in device.implementations]
    candidates = [
        *(
            Forced(f"peftk {who}", note=why, implementation=who) if why else kernel_step(who, parameters(), bits)
            for who, why in mine
        ),
        peers.candidate("bitsandbytes", [peers.BITSANDBYTES], bitsandbytes),
        Candidate(adamw.TORCH, torch.optim.AdamW(parameters(), fused=True, **adamw.OPTIONS).step, work=dense),
        dense_copy(torch.zeros(count, dtype=dtype, device=device.place)),
    ]
    return GpuCase(name, work, candidates, ours=len(mine), calls=calls)


def kernel_step(who: str, params: list[torch.nn.Parameter], bits: int) -> Forced:
    """The op on states that lie ready. Error: of the first parameter after the first step from moments of zero, which goes lr
    along the gradient's sign."""
    lr, grads, before = 0.1, [p.grad for p in params], params[0].detach().double()
    truth = before * (1 - lr * adamw.OPTIONS["weight_decay"]) - lr * grads[0].double().sign()
    hyper = dict(step=1, lr=lr, weight_decay=adamw.OPTIONS["weight_decay"])
    if bits == 32:
        step, states = adamw_step, [[torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(2)]
    else:
        step, states = adamw_step8, [
            *([torch.full_like(p, zero_code8(signed), dtype=torch.uint8) for p in params] for signed in (True, False)),
            *([torch.zeros(-(-p.numel() // STATE_BLOCK), device=p.device) for p in params] for _ in range(2)),
        ]  # fmt: skip

    def error(_: Any) -> float:
        return relative_error(params[0].detach(), truth)

    return Forced(f"peftk {who}", lambda: step(params, grads, *states, **hyper), error, implementation=who)


CASES: dict[str, Callable[..., Iterator[GpuCase]]] = {
    "adamw_step": adamw_step_cases,
    "blockwise8_dequantize": blockwise8_dequantize_cases,
    "blockwise8_quantize": blockwise8_quantize_cases,
    "nf4_dequantize": nf4_dequantize_cases,
    "nf4_linear": nf4_linear_cases,
    "nf4_lora_linear": nf4_lora_linear_cases,
    "nf4_quantize": nf4_quantize_cases,
}
