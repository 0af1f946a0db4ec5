"""Which implementation of an op takes tensors of given shapes, and why not the others: the op's own call on meta tensors."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from peftk.format.nf4 import NF4Weight
from peftk.native import native
from peftk.ops import dispatch
from peftk.ops.adamw_step import adamw_step, adamw_step8
from peftk.ops.ademamix_step import ademamix_step, ademamix_step8
from peftk.ops.blockwise8_dequantize import blockwise8_dequantize
from peftk.ops.blockwise8_quantize import blockwise8_quantize
from peftk.ops.dispatch import Choice
from peftk.ops.lion_step import lion_step, lion_step8
from peftk.ops.lora_linear import lora_linear
from peftk.ops.nf4_linear import nf4_linear
from peftk.ops.nf4_linear_int8 import nf4_linear_int8
from peftk.ops.nf4_lora_linear import nf4_lora_linear
from peftk.ops.nf4_lora_linear_rows import nf4_lora_linear_rows
from peftk.ops.nf4_quantize import nf4_quantize, quantize_nf4
from peftk.ops.philox_dropout import philox_dropout

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Shapes:
    """x (m, k), W (n, k), A (r, k), B (n, r): meta tensors, so that nothing is computed."""

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    block_size: int

    def x(self) -> torch.Tensor:
        return torch.empty(self.m, self.k, dtype=self.dtype, device="meta", requires_grad=True)

    def w(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(self.n, self.k, dtype=dtype or self.dtype, device="meta")

    def w4(self) -> NF4Weight:
        return quantize_nf4(self.w(), self.block_size)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.empty(shape, dtype=self.dtype, device="meta") for shape in ((self.r, self.k), (self.n, self.r)))

    def step(self, moments: int, bits: int) -> tuple[list[torch.Tensor], ...]:
        """Lists for an optimizer's step on W: parameters, gradients, moments, and in 8 bits their absmax."""
        own = torch.uint8 if bits == 8 else torch.float32
        absmax = [[torch.empty(-(-self.n * self.k // 256), device="meta")] for _ in range(moments if bits == 8 else 0)]
        return [self.w()], [self.w()], *([self.w(own)] for _ in range(moments)), *absmax


# A call of each op: the function, then its arguments.
CALLS: Mapping[str, Callable[[Shapes], tuple]] = {
    "nf4_linear": lambda s: (nf4_linear, s.x(), s.w4()),
    "nf4_lora_linear": lambda s: (nf4_lora_linear, s.x(), s.w4(), *s.factors(), 1.0),
    "nf4_lora_linear_rows": lambda s: (nf4_lora_linear_rows, s.x(), s.w4(), *([f] for f in s.factors()), [1.0], [0] * s.m),
    "lora_linear": lambda s: (lora_linear, s.x(), s.w(), *s.factors(), 1.0),
    "nf4_linear_int8": lambda s: (nf4_linear_int8, s.x().detach(), s.w4()),
    "nf4_quantize": lambda s: (nf4_quantize, s.w(), s.block_size),
    "nf4_dequantize": lambda s: (NF4Weight.dequantize, s.w4()),
    "blockwise8_quantize": lambda s: (blockwise8_quantize, s.w()),
    "blockwise8_dequantize": lambda s: (blockwise8_dequantize, *blockwise8_quantize(s.w()), 256, s.dtype),
    "philox_dropout": lambda s: (philox_dropout, s.x(), 0.1, 0),
    "adamw_step": lambda s: (partial(adamw_step, step=1, lr=1e-3), *s.step(2, 32)),
    "adamw_step8": lambda s: (partial(adamw_step8, step=1, lr=1e-3), *s.step(2, 8)),
    "lion_step": lambda s: (partial(lion_step, lr=1e-3), *s.step(1, 32)),
    "lion_step8": lambda s: (partial(lion_step8, lr=1e-3), *s.step(1, 8)),
    "ademamix_step": lambda s: (partial(ademamix_step, step=1, lr=1e-3), *s.step(3, 32)),
    "ademamix_step8": lambda s: (partial(ademamix_step8, step=1, lr=1e-3), *s.step(3, 8)),
}


@dataclass(frozen=True)
class Explanation:
    """``print(explain(…))`` shows it; ``choices`` has the op itself, then what its backward pass calls."""

    op: str
    shapes: Shapes
    device: str
    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        s = self.shapes
        sizes = f"m={s.m} n={s.n} k={s.k} r={s.r} block_size={s.block_size}"
        lines = [f"{self.op}, {sizes}, {str(s.dtype).removeprefix('torch.')}, on {self.device}"]
        for choice in self.choices:
            lines.append(choice.op)
            lines += [f"  {one.name:10} {_verdict(one, choice.chosen)}" for one in choice.candidates]
            if choice.chosen is None:
                lines.append("  nothing of these runs: the call is a RuntimeError with the reasons above")
        return "\n".join(lines)


def _verdict(one: dispatch.Candidate, chosen: str | None) -> str:
    if one.against:
        return "no: " + "; ".join(one.against)
    what = one.kernel or (native().tier() if one.name == "cpu" and native() else "")
    return ("runs" if one.name == chosen else f"could run; {chosen} comes first") + (f": {what}" if what else "")


def explain(
    op: str,
    m: int = 1,
    n: int = 4096,
    k: int = 4096,
    r: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    block_size: int = 64,
) -> Explanation:
    """What a call of ``peftk.ops.<op>`` would run on this machine for x (m, k), W (n, k), A (r, k) and B (n, r) in ``dtype`` on
    ``device`` (cpu or cuda), forward and backward, and the reasons against the other implementations; inside ``peftk.use`` as
    it forces them. Nothing is computed, and a GPU is not needed to ask. ValueError or TypeError names the argument that doesn't
    fit."""
    if op not in CALLS:
        raise ValueError(f"op: expected one of {', '.join(CALLS)}, got {op!r}")
    if device not in DEVICES:
        raise ValueError(f"device: expected one of {', '.join(DEVICES)}, got {device!r}")
    for name, size in (("m", m), ("n", n), ("k", k), ("r", r)):
        if not isinstance(size, numbers.Integral) or size < 1:
            raise ValueError(f"{name}: expected 1 or more, got {size!r}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
    shapes = Shapes(m, n, k, r, dtype, block_size)
    with dispatch.meta_stands_for(device):
        function, *arguments = CALLS[op](shapes)
        with dispatch.asking() as choices:
            y = function(*arguments)
            if isinstance(y, torch.Tensor) and y.requires_grad:
                y.backward(torch.empty_like(y))
    return Explanation(op, shapes, device, tuple(choices))
