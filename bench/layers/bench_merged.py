"""A layer with a merged adapter against its base layer (Hu et al. 2021, section 4.1: no additional latency), without gradients.

Three of each, built alike and taken in turn: a base layer, the same with an adapter merged into it, and with the adapter beside.
One row of x is timed in calls on end, each finding its own weight in L3: of three weights in turn, which together are about as
large as that, one would be there and another not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

import peftk
from bench import peers
from bench.goals import Goal
from bench.linear import NAMES, RANK, Layer, forward_work
from bench.measure import Candidate, Case, relative_error

TESTS = ("tests/methods/test_merge.py",)
BASE = "base layer"
GOALS = (Goal(BASE, 0.97),)  # the wrapper's call costs some microseconds
HEADLINE = "m=1, bf16, nf4"
BASES = {"nf4": lambda layer: peftk.nn.NF4Linear.from_linear(layer.dense), "dense": lambda layer: layer.dense}


def cases(size: int) -> Iterator[Case]:
    layer = Layer.random(size, size, torch.bfloat16)
    for kind in BASES:
        for m in (1, 512):
            x = torch.randn(m, size).bfloat16()
            stored = layer.w4.nbytes if kind == "nf4" else layer.dense.weight.nbytes
            calls = 10 if m == 1 else 1
            yield Case(
                f"m={m}, {NAMES[x.dtype]}, {kind}, {size}x{size}, r={RANK}, forward" + f" ({calls} calls on end)" * (calls > 1),
                forward_work(x, size, stored),
                [
                    candidate("peftk", peftk.merge(adapted(layer, kind)), x),
                    candidate(BASE, nn.Sequential(BASES[kind](layer)), x),
                    candidate("peftk, adapter beside", adapted(layer, kind), x),
                ],
                GOALS,
                calls=calls,
            )


def adapted(layer: Layer, kind: str) -> nn.Module:
    """A model of one layer, on weights of its own, with a LoRA adapter that isn't zero."""
    own = Layer(layer.w4, peers.dense_linear(layer.w4, torch.bfloat16))
    model = peftk.attach(nn.Sequential(BASES[kind](own)), peftk.LoraConfig(r=RANK, target_modules=["0"]))
    nn.init.normal_(model[0].lora_B["default"], std=0.02)
    return model


def candidate(who: str, model: nn.Module, x: torch.Tensor) -> Candidate:
    """The error is against the weight as it is stored, with the adapters that run beside it."""
    layer = model[0]
    w = layer.base_layer.dense_weight() if hasattr(layer, "base_layer") else peftk.nn.base_layer(layer).dense_weight()
    added = [layer.delta_weight(name) for name in layer.running()] if hasattr(layer, "base_layer") else []
    truth = x.double() @ sum(added, w.double()).T
    return Candidate(who, peers.no_grad(lambda: model(x)), lambda y: relative_error(y, truth))
