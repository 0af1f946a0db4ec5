"""Greedy generation with transformers' ``generate``: the real SmolLM2-135M, a prompt of some ten tokens, 64 new ones, bf16.

Everyone runs the same loop on the same 4-bit weights, in turn in one process; the dense model has them written out.
"no linears" is ours with 4-bit layers and head that return zeros at once: what the rest of the stack takes, which no kernel of
ours can better.
"head in 4 bits" rounds the head as well, which is tied to the embeddings and stays dense elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn

import peftk
from bench import isa, peers
from bench.goals import Goal
from bench.limits import Limits
from bench.measure import Candidate, Case, Row, Work, interleave, rows_of
from bench.models import bench_smollm2 as smollm2
from peftk.integrations import bitsandbytes as backend

TESTS = ("tests/ops/test_nf4_linear.py", "tests/ops/test_nf4_lora_linear.py", "tests/methods/test_merge.py")
PROMPT = "Anne Elliot, with all her claims of birth, beauty, and mind,"
TOKENS, BATCHES = 64, (1, 4)
OURS, WITHOUT, WITH = "peftk", "bitsandbytes", "bitsandbytes on peftk"
GOALS = (Goal(WITHOUT, 1.5),)
HEADLINE = "batch 1"


def rows(size: int, repeat: int, limits: Limits) -> Iterator[list[Row]]:
    """``size`` is the model's own."""
    everyone = models()
    for batch in BATCHES:
        ids = prompt(batch)
        switches: list[Callable[[], object]] = []
        candidates = []
        for who, model in everyone.items():
            candidates.append(Candidate(who, partial(generated, model, ids)))
            switches.append(backend.enable if who == WITH else backend.disable)
        try:
            times = interleave([c.run for c in candidates], repeat, 300.0, prepare=lambda i, s=switches: s[i]())
        finally:
            backend.disable()
        case = Case(f"SmolLM2-135M, batch {batch}, {TOKENS} tokens, bf16, generate", Work(0, 0), candidates, GOALS)
        case = isa.goals_when_forced(case) if isa.forced() else case
        seconds = dict(zip(everyone, times, strict=True))
        yield [with_rate(row, batch) for row in rows_of(case, limits, seconds, {})]


def with_rate(row: Row, batch: int) -> Row:
    rate = f"{batch * TOKENS / row.p50:.1f} tokens/s"
    return replace(row, note="; ".join(filter(None, [rate, row.note])))


def prompt(batch: int) -> torch.Tensor:
    """input_ids (batch, tokens), the same in each row."""
    from peftk.cli.models import open_model

    return open_model("smollm2")[1](PROMPT, return_tensors="pt").input_ids.repeat(batch, 1)


@torch.no_grad()
def generated(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(batch, prompt + TOKENS)"""
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)


def models() -> dict[str, nn.Module]:
    """Everyone's, in eval mode, ours first; what bitsandbytes runs through us is another model, since it rewrites its weights."""
    on_bitsandbytes = partial(peers.bnb_linear, compute_dtype=torch.bfloat16)
    made = {
        OURS: smollm2.quantised,
        "peftk, adapter beside": adapted,
        "peftk, adapter merged": lambda: peftk.merge(adapted()),
        "peftk, head in 4 bits": with_small_head,
        "no linears": without_linears,
        WITHOUT: partial(smollm2.on_peers, on_bitsandbytes),
        WITH: partial(smollm2.on_peers, on_bitsandbytes),
        "dense bf16": partial(smollm2.on_peers, partial(peers.dense_linear, dtype=torch.bfloat16)),
    }
    return {who: make().eval() for who, make in made.items()}


def adapted() -> nn.Module:
    """With an adapter that isn't zero."""
    model = smollm2.ours()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.002)
    return model


def with_small_head() -> nn.Module:
    model = smollm2.quantised()
    model.lm_head = peftk.nn.NF4Linear.from_linear(model.lm_head)
    return model


class Zeros(nn.Module):
    """A linear layer that costs nothing: a row of zeros, made once, stands for all rows of y."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.register_buffer("row", torch.zeros(linear.out_features, dtype=torch.bfloat16), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.row.expand(*x.shape[:-1], -1)


def without_linears() -> nn.Module:
    model = smollm2.quantised()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Zeros(module))
    return model
