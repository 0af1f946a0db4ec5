"""A training step of the real SmolLM2-135M: QLoRA r = 16 on all linear layers, 4 sequences of 256 tokens, bf16, AdamW.

The same loop for everyone (``model(input_ids=ids, labels=ids)``, backward, AdamW on the adapters), steps in turn in one process
on the same batches, from the same adapters: ours are saved and HF peft reads them. All bases hold the same 4-bit weights, the
dense one written out in bf16, so the losses must be equal but for rounding. "peftk finetune" is the step of our own command,
which keeps no whole logits and clips the gradient. The steps count from the second on.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

import peftk
from bench import isa, peers
from bench.goals import Goal
from bench.limits import Limits
from bench.measure import Candidate, Case, Row, Work, interleave, rows_of
from bench.report import ROOT

TESTS = (
    "tests/ops/test_nf4_lora_linear.py",
    "tests/methods/test_lora.py",
    "tests/cli/test_training.py",
    "tests/cli/test_loss.py",
)
SEQUENCES, LENGTH, RANK, ALPHA, RATE = 4, 256, 16, 32.0, 5e-4
TOKENS = SEQUENCES * LENGTH
SHOWN = 5  # losses side by side
OURS, OWN_STEP = "peftk", "peftk finetune"
ON_BITSANDBYTES, ON_DENSE = "HF peft on bitsandbytes", "HF peft on dense bf16"
GOALS = {OURS: (Goal(ON_BITSANDBYTES, 1.25), Goal(ON_DENSE, 1.2)), OWN_STEP: (Goal(ON_BITSANDBYTES, 1.5),)}
HEADLINE = "plain loop"
STEPS_IN_PROFILE = 3


def rows(size: int, repeat: int, limits: Limits) -> Iterator[list[Row]]:
    """Two cases out of the same rounds: the plain loop, and the step of ``peftk finetune``. ``size`` is the model's own."""
    everyone, losses = candidates(repeat + 2)
    present = [c for c in everyone if c.run is not None]
    times = dict(zip([c.who for c in present], interleave([c.run for c in present], repeat, budget=600.0), strict=True))
    print(side_by_side(losses), end="\n\n")
    shape = f"SmolLM2-135M, {SEQUENCES}x{LENGTH} tokens, bf16, r={RANK}, training step"
    for ours, title in ((OURS, "plain loop"), (OWN_STEP, "peftk finetune's step")):
        first = next(c for c in everyone if c.who == ours)
        others = [c for c in everyone if c.who not in (OURS, OWN_STEP)]
        case = Case(f"{title}, {shape}", Work(0, 0), [first, *others], GOALS[ours])
        case = isa.goals_when_forced(case) if isa.forced() else case
        yield [_with_rate(row) for row in rows_of(case, limits, times, {})]


def _with_rate(row: Row) -> Row:
    return row if row.p50 is None else replace(row, note="; ".join(filter(None, [f"{TOKENS / row.p50:.0f} tokens/s", row.note])))


def side_by_side(losses: dict[str, list[float]]) -> str:
    """The first steps' losses, a line each candidate."""
    width = max(map(len, losses))
    return "\n".join(f"{who:<{width}}  {'  '.join(f'{x:.4f}' for x in seen[:SHOWN])}" for who, seen in losses.items())


def profile(rows: int = 25) -> str:
    """Where a step's time goes: the top operators by their own CPU time, for both of our steps."""
    from torch.profiler import ProfilerActivity, profile

    tables = []
    for candidate in candidates(STEPS_IN_PROFILE + 1)[0]:
        if candidate.who not in (OURS, OWN_STEP):
            continue
        candidate.run()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            for _ in range(STEPS_IN_PROFILE):
                candidate.run()
        table = seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=50)
        tables.append(f"{candidate.who}, {STEPS_IN_PROFILE} steps\n{table}")
    return "\n".join(tables)


# ---- models -----------------------------------------------------------------------------------------------------------------


def candidates(steps: int) -> tuple[list[Candidate], dict[str, list[float]]]:
    """Everyone with a run that does its next step, and the losses that they will have seen."""
    ids = batches(steps)
    losses: dict[str, list[float]] = {}

    def stepping(who: str, step: Callable[[torch.Tensor], float]) -> peers.Run:
        seen, upcoming = losses.setdefault(who, []), itertools.cycle(ids)
        return lambda: seen.append(step(next(upcoming)))

    model = ours()
    with tempfile.TemporaryDirectory() as folder:
        peftk.save_adapter(model, folder)

        def hf(who: str, replacement: Callable[[peftk.NF4Weight], nn.Module]) -> peers.Run:
            return stepping(who, plain_step(with_hf_peft(on_peers(replacement), folder)))

        on_bitsandbytes = partial(peers.bnb_linear, compute_dtype=torch.bfloat16)
        on_dense = partial(peers.dense_linear, dtype=torch.bfloat16)
        everyone = [
            Candidate(OURS, stepping(OURS, plain_step(model))),
            Candidate(OWN_STEP, stepping(OWN_STEP, own_step(ours()))),
            peers.candidate(ON_BITSANDBYTES, [peers.HF_PEFT, peers.BITSANDBYTES], lambda: hf(ON_BITSANDBYTES, on_bitsandbytes)),
            peers.candidate(ON_DENSE, [peers.HF_PEFT], lambda: hf(ON_DENSE, on_dense)),
        ]
    return everyone, losses


def batches(steps: int) -> list[torch.Tensor]:
    """input_ids (SEQUENCES, LENGTH) of each step, from the sample text."""
    from peftk.cli.models import open_model

    _, tokenizer = open_model("smollm2")
    ids = tokenizer((ROOT / "bench" / "data" / "persuasion.txt").read_text(), verbose=False).input_ids
    steps = min(steps, len(ids) // TOKENS)
    return list(torch.tensor(ids[: steps * TOKENS]).view(steps, SEQUENCES, LENGTH))


def quantised() -> nn.Module:
    """The model as ``peftk finetune`` prepares it."""
    from peftk.cli.models import open_model
    from peftk.cli.prepare import prepare_base

    return prepare_base(open_model("smollm2")[0], "nf4", torch.bfloat16, torch.device("cpu"))


def ours() -> nn.Module:
    """With an adapter that is the same each time."""
    torch.manual_seed(0)
    config = peftk.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return peftk.attach(quantised(), config).train()


def on_peers(replacement: Callable[[peftk.NF4Weight], nn.Module]) -> nn.Module:
    """The model with each 4-bit layer replaced by another on the same weight."""
    model = quantised()
    for path, module in list(model.named_modules()):
        if isinstance(module, peftk.nn.NF4Linear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, replacement(module.w4))
    return model


def with_hf_peft(model: nn.Module, adapter: str) -> nn.Module:
    """HF peft around the model, with the adapter of a folder."""
    import peft

    model.is_loaded_in_4bit = any(type(module).__name__ == "Linear4bit" for module in model.modules())
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).train()


# ---- steps ------------------------------------------------------------------------------------------------------------------


def plain_step(model: Any, kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW) -> Callable[[torch.Tensor], float]:
    """input_ids -> loss, of a step as anyone would write it, with an optimizer of that kind."""
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def step(ids: torch.Tensor) -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def own_step(model: nn.Module) -> Callable[[torch.Tensor], float]:
    """The step of ``peftk finetune`` on one batch."""
    from peftk.cli.loss import LanguageModelLoss
    from peftk.cli.packing import Sequences
    from peftk.cli.training import Plan, backward_of_step

    trainable = peftk.trainable_parameters(model)
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.01)  # 0.01 is AdamW's own, as in the plain loop
    loss = LanguageModelLoss(model)
    plan = Plan(1, SEQUENCES, 1, RATE, "constant", 0, 1.0, 0.01, 0, 0, 0)

    def step(ids: torch.Tensor) -> float:
        mean, _ = backward_of_step(loss, Sequences(ids, ids), 0, plan, ids.device)
        nn.utils.clip_grad_norm_(trainable, plan.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return mean

    return step
