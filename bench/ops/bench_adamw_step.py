"""`optimizer.step()` of AdamW: 64 M fp32 parameters in one tensor, with moments in fp32 and in 8 bits, and the 420 small tensors
of a rank-16 LoRA on SmolLM2-135M.

Bytes: parameter, gradient and both moments are read, all but the gradient written; in 8 bits a moment is a byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bench import peers
from bench.goals import Goal
from bench.measure import Candidate, Case, Work
from peftk.optim import AdamW, AdamW8bit

Shapes = Sequence[tuple[int, int]]
# A and B of q, k, v, o, gate, up, down in each of 30 layers.
LORA = [(16, 576), (576, 16), (16, 576), (192, 16), (16, 576), (192, 16), (16, 576), (576, 16)] + [
    (16, 576), (1536, 16), (16, 576), (1536, 16), (16, 1536), (576, 16),
]  # fmt: skip
LORA *= 30
TORCH = "torch fused"
OPTIONS = dict(lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


def cases(size: int) -> Iterator[Case]:
    whole = [(4 * size, size)]
    yield Case(f"{4 * size}x{size} fp32", work(whole, 8), [ours(whole), torch_fused(whole)], Goal(TORCH, 1 / 1.05))
    yield Case(f"{len(LORA)} tensors of a LoRA", work(LORA, 8), [ours(LORA), torch_fused(LORA)], Goal(TORCH, 1 / 1.25), calls=20)
    goals = Goal("bitsandbytes", 15), Goal(TORCH, 1 / 2.2)
    candidates = [ours8(whole), bitsandbytes8(whole), torch_fused(whole)]
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


def ours(shapes: Shapes) -> Candidate:
    return Candidate("peftk", AdamW(parameters(shapes), **OPTIONS).step)


def ours8(shapes: Shapes) -> Candidate:
    return Candidate("peftk", AdamW8bit(parameters(shapes), **OPTIONS).step)


def torch_fused(shapes: Shapes) -> Candidate:
    return Candidate(TORCH, torch.optim.AdamW(parameters(shapes), fused=True, **OPTIONS).step, work=work(shapes, 8))


def bitsandbytes8(shapes: Shapes) -> Candidate:
    def make() -> peers.Run:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters(shapes), **OPTIONS).step

    return peers.candidate("bitsandbytes", [peers.BITSANDBYTES], make)
