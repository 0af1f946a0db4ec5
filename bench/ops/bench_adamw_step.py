"""`optimizer.step()` of AdamW: 64 M fp32 parameters in one tensor, with moments in fp32 and in 8 bits, and the 420 small tensors
of a rank-16 LoRA on SmolLM2-135M.

Bytes: parameter, gradient and both moments are read, all but the gradient written; in 8 bits a moment is a byte. Error: of the
first step's change of the first parameter.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench import peers
from bench.goals import Goal
from bench.measure import Candidate, Case, Work, relative_error
from peftk.optim import AdamW, AdamW8bit

Shapes = Sequence[tuple[int, int]]
# A and B of q, k, v, o, gate, up, down in each of 30 layers.
LORA = [(16, 576), (576, 16), (16, 576), (192, 16), (16, 576), (192, 16), (16, 576), (576, 16)] + [
    (16, 576), (1536, 16), (16, 576), (1536, 16), (16, 1536), (576, 16),
]  # fmt: skip
LORA *= 30
TORCH = "torch fused"
SAMPLE = 4096  # elements that are held against fp64
OPTIONS = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


def cases(size: int) -> Iterator[Case]:
    whole = [(4 * size, size)]
    yield Case(f"{4 * size}x{size} fp32", work(whole, 8), [ours(whole), torch_fused(whole)], Goal(TORCH, 1 / 1.05))
    yield Case(f"{len(LORA)} tensors of a LoRA", work(LORA, 8), [ours(LORA), torch_fused(LORA)], Goal(TORCH, 1 / 1.25), calls=20)
    goals = Goal("bitsandbytes", 15), Goal(TORCH, 1 / 2.2)
    candidates = [ours8(whole), bitsandbytes("AdamW8bit", whole, 2, **OPTIONS), torch_fused(whole)]
    yield Case(f"{4 * size}x{size}, 8 bits", work(whole, 2), candidates, goals)


def work(shapes: Shapes, state: int) -> Work:
    """Of fp32 parameters with so many bytes of state each."""
    count = sum(rows * columns for rows, columns in shapes)
    return Work(read=(8 + state) * count, write=(4 + state) * count, flop=15 * count, dtype=torch.float32)


def parameters(shapes: Shapes) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def first_change(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """What AdamW's first step adds: from moments of zero it goes lr along the gradient's sign."""
    return -param * OPTIONS["lr"] * OPTIONS["weight_decay"] - OPTIONS["lr"] * grad / (grad.abs() + OPTIONS["eps"])


def candidate(
    who: str,
    kind: Callable[..., torch.optim.Optimizer],
    shapes: Shapes,
    state: int,
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = first_change,
    **options: Any,
) -> Candidate:
    """An optimizer's step; ``change`` is what its first one adds to a parameter, of that and its gradient."""
    params = parameters(shapes)
    before, grad = (t.detach().view(-1)[:SAMPLE].double() for t in (params[0], params[0].grad))
    truth = change(before, grad)

    def error(_: Any) -> float:
        return relative_error(params[0].detach().view(-1)[:SAMPLE].double() - before, truth)

    return Candidate(who, kind(params, **options).step, error, work(shapes, state))


def ours(shapes: Shapes) -> Candidate:
    return candidate("peftk", AdamW, shapes, 8, **OPTIONS)


def ours8(shapes: Shapes) -> Candidate:
    return candidate("peftk", AdamW8bit, shapes, 2, **OPTIONS)


def torch_fused(shapes: Shapes) -> Candidate:
    return candidate(TORCH, torch.optim.AdamW, shapes, 8, fused=True, **OPTIONS)


def bitsandbytes(name: str, shapes: Shapes, state: int, *change: Callable[..., torch.Tensor], **options: Any) -> Candidate:
    """Its optimizer of that name, where it is installed."""
    there = peers.candidate("bitsandbytes", [peers.BITSANDBYTES], lambda: lambda: None)
    if there.run is None:
        return there
    kind = getattr(importlib.import_module("bitsandbytes.optim"), name)
    return candidate("bitsandbytes", kind, shapes, state, *change, **options)
