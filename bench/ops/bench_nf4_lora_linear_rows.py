"""A batch whose rows have one of four adapters each, r = 16, without gradients: one op, against a call of nf4_lora_linear for
each adapter's rows, against the base product with each adapter's share added, and against HF peft's mixed batch (adapter_names=).

Rows of an adapter are not neighbours, as requests come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from bench import peers
from bench.goals import Goal
from bench.linear import NAMES, RANK, SCALE, Layer, forward_work
from bench.measure import Candidate, Case, Work, relative_error
from peftk.nn.dense_linear import add_low_rank_rows
from peftk.ops import nf4_linear, nf4_lora_linear, nf4_lora_linear_rows

ADAPTERS = 4
EACH, ADDED, MIXED = "peftk, a call for each adapter", "peftk, shares added", "HF peft on bitsandbytes"
GOALS = (Goal(EACH, 1), Goal(ADDED, 1), Goal(MIXED, 1.5))
HEADLINE = "8 rows"


def cases(size: int) -> Iterator[Case]:
    layer = Layer.random(size, size, torch.bfloat16)
    for rows, tokens in ((8, 1), (32, 1), (8, 64)):
        x = torch.randn(rows, tokens, size).bfloat16()
        A = [torch.randn(RANK, size).mul_(size**-0.5) for _ in range(ADAPTERS)]
        B = [torch.randn(size, RANK).mul_(RANK**-0.5) for _ in range(ADAPTERS)]
        index = [row % ADAPTERS for row in range(rows)]
        of = f"{rows} rows" + f" of {tokens} tokens" * (tokens > 1)
        name = f"{of}, {ADAPTERS} adapters, {NAMES[x.dtype]}, {size}x{size}, r={RANK}, forward"
        yield Case(name, work(layer, x, A, B), candidates(layer, x, A, B, index), GOALS)


def work(layer: Layer, x: torch.Tensor, A: list[torch.Tensor], B: list[torch.Tensor]) -> Work:
    n, k = layer.w4.shape
    base = forward_work(x.view(-1, k), n, layer.w4.nbytes)
    factors = sum(t.nbytes for t in (*A, *B))
    return Work(base.read + factors, base.write, base.flop + 2 * x.shape[:-1].numel() * RANK * (n + k), x.dtype)


def candidates(layer: Layer, x: torch.Tensor, A: list[torch.Tensor], B: list[torch.Tensor], index: list[int]) -> list[Candidate]:
    scale = [SCALE] * ADAPTERS
    rows = [torch.tensor([row for row, one in enumerate(index) if one == i]) for i in range(ADAPTERS)]
    truth = x.double() @ layer.stored().double().T
    for i, own in enumerate(rows):
        truth[own] += SCALE * (x[own].double() @ A[i].double().T @ B[i].double().T)

    def each() -> torch.Tensor:
        y = x.new_empty(*x.shape[:-1], layer.w4.shape[0])
        for own, a, b in zip(rows, A, B, strict=True):
            y[own] = nf4_lora_linear(x[own], layer.w4, a, b, SCALE)
        return y

    def added() -> torch.Tensor:
        return add_low_rank_rows(nf4_linear(x, layer.w4), x, A, B, scale, index, None)

    ours: dict[str, Callable[[], torch.Tensor]] = {
        "peftk": lambda: nf4_lora_linear_rows(x, layer.w4, A, B, scale, index),
        EACH: each,
        ADDED: added,
    }
    error = lambda y: relative_error(y, truth)  # noqa: E731
    return [
        *(Candidate(who, peers.no_grad(run), error) for who, run in ours.items()),
        peers.candidate(MIXED, [peers.HF_PEFT, peers.BITSANDBYTES], lambda: mixed(layer, x, A, B, index), error),
    ]


def mixed(layer: Layer, x: torch.Tensor, A: list[torch.Tensor], B: list[torch.Tensor], index: list[int]) -> peers.Run:
    """HF peft's own layer on bitsandbytes, with the same adapters."""
    import peft

    model = nn.Sequential()
    model.base, model.is_loaded_in_4bit = peers.bnb_linear(layer.w4, x.dtype), True
    config = peft.LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=["base"])
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        model = peft.inject_adapter_in_model(config, model, adapter_name=f"adapter {i}")
        model.base.lora_A[f"adapter {i}"].weight.data.copy_(a)
        model.base.lora_B[f"adapter {i}"].weight.data.copy_(b)
    wrapped, names = model.base.eval(), [f"adapter {i}" for i in index]
    return peers.no_grad(lambda: wrapped(x, adapter_names=names))
