"""Held-out loss after a full fine-tuning of SmolLM2-135M with moments in 8 bits, paged, and both, beside that with fp32 moments:
the same batches in the same order, fp32 parameters, products in bf16 by autocast. Error: how far the loss is from the one with
fp32 moments, relative. Times are not what this measures, and it has none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from bench.goals import Verdict
from bench.limits import Limits
from bench.measure import Row
from bench.report import ROOT
from peftk.cli.models import open_model
from peftk.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit

TESTS = ("tests/ops/test_adamw_step.py", "tests/optim/test_adamw.py", "tests/optim/test_pages.py")
STEPS, TOKENS, HELD_OUT = 24, 256, 8  # of training: steps, tokens in each; sequences of as many tokens that are held out
RATE = 2e-5
MOST = 0.005  # of the loss
PLAIN = "32 bits"
HEADLINE = "8 bits, paged"

Optimize = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


def optimizers(parameters: int) -> dict[str, Optimize]:
    """Of a model of so many parameters; where paged, half of the moments may be resident."""
    return {
        PLAIN: lambda p: AdamW(p, lr=RATE),
        "8 bits": lambda p: AdamW8bit(p, lr=RATE),
        "paged": lambda p: PagedAdamW(p, lr=RATE, budget=4 * parameters),
        "8 bits, paged": lambda p: PagedAdamW8bit(p, lr=RATE, budget=parameters),
    }


def rows(size: int, repeat: int, limits: Limits) -> Iterator[list[Row]]:
    """A case for each kind of moments; ``size`` is the model's own."""
    training, held_out = data()
    plain = before = 0.0
    for who, optimize in optimizers(sum(p.numel() for p in fresh_model().parameters())).items():
        model = fresh_model()
        before = before or loss_on(model, held_out)
        train(model, optimize(list(model.parameters())), training)
        after = loss_on(model, held_out)
        if who == PLAIN:
            plain = after
            continue
        difference = abs(after - plain) / plain
        verdict = Verdict(f"<= {MOST:.1%} from {PLAIN}", f"{difference:.3%}", difference <= MOST)
        name = f"{who}, SmolLM2-135M, full fine-tuning, {STEPS} steps of {TOKENS} tokens"
        note = f"held-out loss {before:.4f} -> {after:.4f}, with {PLAIN} {plain:.4f}"
        yield [Row(name, "peftk", error=difference, verdicts=(verdict,), note=note)]


def fresh_model() -> nn.Module:
    return open_model("smollm2")[0].float()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """(STEPS, TOKENS) and (HELD_OUT, TOKENS) ids of the public-domain text, the latter from its end."""
    ids = torch.tensor(open_model("smollm2")[1]((ROOT / "bench" / "data" / "persuasion.txt").read_text())["input_ids"])
    return ids[: STEPS * TOKENS].view(STEPS, TOKENS), ids[-HELD_OUT * TOKENS :].view(HELD_OUT, TOKENS)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, sequences: torch.Tensor) -> None:
    """A step on each sequence."""
    model.train()
    for ids in sequences:
        with products_in_bf16():
            loss = model(input_ids=ids[None], labels=ids[None]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss_on(model: nn.Module, sequences: torch.Tensor) -> float:
    """Nats a token."""
    model.eval()
    with products_in_bf16():
        return sum(model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in sequences) / len(sequences)


def products_in_bf16() -> contextlib.AbstractContextManager[None]:
    return torch.autocast("cpu", torch.bfloat16)
