"""A training step of one decoder layer of LLaMA in 4 bits with LoRA, as it stands and compiled by torch's inductor into one
graph: forward, and gradients of x and of every adapter. Compiled rows say how long that took, and how many graphs BATCHES made.

HF peft on bitsandbytes beside it, both ways. ``size`` is four times the layer's width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bench import isa, peers
from bench.distributed_step import ON_BITSANDBYTES, OURS, RANK, build, config_of
from bench.goals import Goal
from bench.limits import Limits
from bench.measure import Candidate, Case, Row, Work, measure_case

TESTS = ("tests/test_compile.py", "tests/ops/test_nf4_lora_linear.py")
ROWS, TOKENS = 4, 128  # of a step
BATCHES = (4, 2, 3, 6, 5)
COMPILED, EAGER = f"{OURS}, compiled", OURS
GOAL = Goal(EAGER, 1)
HEADLINE = "decoder layer"


def rows(size: int, repeat: int, limits: Limits) -> Iterator[list[Row]]:
    """One case."""
    told: dict[str, str] = {}
    both = [peers.HF_PEFT, peers.BITSANDBYTES]
    case = Case(
        f"decoder layer of LLaMA, {size // 4} wide, {ROWS}x{TOKENS} tokens, bf16, r={RANK}, forward + backward",
        Work(0, 0),
        [
            Candidate(COMPILED, compiled(OURS, size, told)),
            Candidate(EAGER, step_of(layer_of(OURS, size))),
            peers.candidate(ON_BITSANDBYTES, both, lambda: step_of(layer_of(ON_BITSANDBYTES, size))),
            peers.candidate(f"{ON_BITSANDBYTES}, compiled", both, lambda: _or_unavailable(size, told)),
        ],
        GOAL,
    )
    case = isa.goals_when_forced(case) if isa.forced() else case
    yield [
        replace(row, note="; ".join(filter(None, (told.get(row.who), row.note)))) for row in measure_case(case, limits, repeat)
    ]


def _or_unavailable(size: int, told: dict[str, str]) -> peers.Run:
    try:
        return compiled(ON_BITSANDBYTES, size, told)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise peers.Unavailable(f"can't be compiled into one graph: {lines[0]}") from error


def compiled(who: str, size: int, told: dict[str, str], backend: str = "inductor") -> peers.Run:
    """The step by a compiled layer; what compiling took goes to ``told``."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    layer = layer_of(who, size)
    compiled_layer = torch.compile(layer, fullgraph=True, backend=backend)
    seconds = []
    for batch in BATCHES:
        before = time.perf_counter()
        step_of(layer, compiled_layer, batch)()
        seconds.append(time.perf_counter() - before)
    graphs = counters["stats"]["unique_graphs"]
    told[f"{who}, compiled"] = (
        f"compiled in {seconds[0]:.1f} s, for any batch in {seconds[1]:.1f} s more; {graphs} graphs for batches of "
        f"{', '.join(map(str, BATCHES))}"
    )
    return step_of(layer, compiled_layer)


def layer_of(who: str, size: int) -> nn.Module:
    """The only layer of a model, with its rotary embedding as ``rotary``."""
    config = config_of(size)
    config.num_hidden_layers = 1
    model = build(who, config)
    inner = model.get_base_model().model if who == ON_BITSANDBYTES else model.model
    layer = inner.layers[0]
    layer.__dict__["rotary"] = inner.rotary_emb  # no submodule: what it makes is an input
    return layer


def step_of(layer: nn.Module, call: Callable[..., Any] | None = None, batch: int = ROWS) -> peers.Run:
    """-> y and the gradients of x and the adapters, of ``call``, the layer itself or what it was compiled to."""
    call = layer if call is None else call
    generator = torch.Generator().manual_seed(batch)
    width = next(module.in_features for module in layer.modules() if hasattr(module, "in_features"))
    x = torch.randn(batch, TOKENS, width, generator=generator, dtype=torch.float32).bfloat16().requires_grad_()
    with torch.no_grad():
        positions = layer.rotary(x, torch.arange(TOKENS)[None].expand(batch, -1))
    trained = [p for p in layer.parameters() if p.requires_grad]

    def run() -> tuple[torch.Tensor, ...]:
        y = call(x, position_embeddings=positions)
        y = y[0] if isinstance(y, tuple) else y
        return (y.detach(), *torch.autograd.grad(y, (x, *trained), torch.ones_like(y)))

    return run
