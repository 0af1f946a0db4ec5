"""`python -m bench.pages.llama_65b` writes 65b.md: what a QLoRA step of LLaMA-65B takes and sends on 2, 8 and 64 GPUs, by the
planner's code. Nothing is measured for it, and nothing but shapes is needed."""

from __future__ import annotations

import argparse
from pathlib import Path

from peftk import planner
from peftk.atomic import write_file
from peftk.planner import traffic
from peftk.planner.planning import BUCKETS, GATHERED, Machine, Plan, collectives_of, part_of
from peftk.planner.step import ADAPTERS, CONSTANTS, GRADIENTS, OPTIMIZER, WEIGHTS, WEIGHTS4

PAGE = Path(__file__).with_name("65b.md")
MODEL, RANK, TOKENS = "llama-65b", 64, 512
GPUS = (2, 8, 64)
ENGINES = {"ddp": "DDP", "fsdp": "`fully_shard`", "tp": "tensor parallel"}
COLUMNS = {
    "weights": (WEIGHTS4, CONSTANTS, WEIGHTS),
    "adapters, gradients, states": (ADAPTERS, GRADIENTS, BUCKETS, OPTIMIZER),
    "gathered": (GATHERED,),
}
HEAD = f"""\
# LLaMA-65B on several GPUs

What one GPU holds at a QLoRA step's fullest moment, and what it sends in a step: NF4 with double-quantised constants, LoRA of
rank {RANK} on all linear layers, bf16, gradient checkpointing, AdamW with 32-bit states, 1 x {TOKENS} tokens. Calculated by
`peftk/planner`; nothing here was measured on a GPU. `python -m bench distributed` holds the same code against processes that
count their tensors and collectives, to the byte. `python -m bench.pages.llama_65b` writes this page.
"""
TAIL = """\
In GB (10^9 bytes), but for the last column. "Weights" are codes, constants and what stays in bf16: embeddings, head, norms. "In
all" has activations, logits and {reserved:.1f} GB for driver and libraries on top of the columns before it. "Sent" is what one
GPU puts on the wire in a step by ring algorithms, "a token" the same by the step's tokens: {tokens} on each GPU, but with tensor
parallelism {tokens} on all of them.

- DDP sends only the adapters' gradients, once; every GPU holds the whole model.
- `fully_shard` (after `peftk.nn.constants_as_parameters`) gathers each layer's codes, constants and adapters twice, for its
  forward and its backward pass, and scatters the adapters' gradients in fp32: the same for any number of tokens, so a larger
  batch makes it cheaper. What is gathered at a time, two layers and all that is in none, is the same on any number of GPUs.
  A factor of {rank} rows lies on {rank} GPUs at most.
- Tensor parallelism (`peftk.integrations.tensor_parallel.plan_of`) sends activations, in proportion to the tokens, and the
  gradients of factors that stay whole, as embeddings and head do.
  {even}
"""
Plans = dict[tuple[int, str], Plan | str]  # by GPUs and engine; the reason where it can't be split so


def blueprint(step: planner.Step) -> planner.Blueprint:
    """The model as ``peftk finetune`` trains it."""
    from peftk.cli.memory import blueprint_of

    arguments = argparse.Namespace(model=MODEL, dtype="bf16", method="qlora", dropout=0.0)
    return blueprint_of(arguments, planner.Choice(step, Machine(), "nf4", RANK, "qlora"))


def plans() -> Plans:
    """Every line of the table."""
    from peftk.cli.loss import LanguageModelLoss

    step = planner.Step(1, TOKENS, checkpointing=True)
    made = blueprint(step)
    whole = [(1, "ddp"), *((n, engine) for n in GPUS for engine in ("ddp", "fsdp"))]
    machines = [Machine(*one) for one in whole]
    found: Plans = dict(zip(whole, planner.plans(made, LanguageModelLoss, step, machines), strict=True))
    for n in GPUS:
        try:
            found[n, "tp"] = planner.plan(made, LanguageModelLoss, step, Machine(n, "tp"))
        except ValueError as error:
            found[n, "tp"] = str(error)
    return found


def tokens_for(nbytes: int, gpus: int) -> float:
    """In a step of tensor parallelism, for a GPU to send so many bytes: they are affine in the tokens."""
    sent = []
    for length in (TOKENS, 2 * TOKENS):
        step = planner.Step(1, length, checkpointing=True)
        sent.append(sum(traffic.sent(collectives_of(part_of(blueprint(step), gpus), step, Machine(gpus, "tp")), gpus).values()))
    return TOKENS * (1 + (nbytes - sent[0]) / (sent[1] - sent[0]))


def text(found: Plans) -> str:
    """The page."""
    columns = ("GPUs", "engine", *COLUMNS, "in all", "smallest card that holds it", "sent", "a token")
    lines = [f"| {' | '.join(columns)} |", f"|--:|---|{'--:|' * (len(COLUMNS) + 1)}---|--:|--:|"]
    for n in (1, *GPUS):
        lines += [_line(n, engine, found[n, engine]) for engine in ENGINES if (n, engine) in found]
    tail = TAIL.format(reserved=_reserved(found[1, "ddp"]) / 1e9, tokens=TOKENS, rank=RANK, even=_even(found))
    return f"{HEAD}\n" + "\n".join(lines) + f"\n\n{tail}"


def _line(gpus: int, engine: str, plan: Plan | str) -> str:
    name = ENGINES[engine] if gpus > 1 else "–"
    if isinstance(plan, str):
        return f"| {gpus} | {name} | {' | '.join('–' for _ in range(len(COLUMNS) + 1))} | can't be split so: {plan} | – | – |"
    figures = [sum(plan.parts.get(kind, 0) for kind in kinds) for kinds in COLUMNS.values()]
    held = " | ".join(f"{n / 1e9:.2f}" if n else "–" for n in (*figures, plan.total))
    cards = {name: size for name, size in planner.CARDS.items() if size >= plan.total}
    card = min(cards, key=cards.get) if cards else "none"
    if gpus == 1:
        return f"| 1 | – | {held} | {card} | – | – |"
    tokens = TOKENS if engine == "tp" else TOKENS * gpus
    return f"| {gpus} | {name} | {held} | {card} | {plan.sent / 1e9:.2f} GB | {plan.sent / tokens / 1e6:.2f} MB |"


def _reserved(plan: Plan) -> int:
    return plan.parts["driver and libraries"]


def _even(found: Plans) -> str:
    """Where tensor parallelism sends as much as fully_shard does for any number of tokens."""
    split = [n for n in GPUS if isinstance(found[n, "tp"], Plan)]
    told = [f"{round(tokens_for(found[n, 'fsdp'].sent, n), -2):,.0f} tokens a step on {n}" for n in split]
    return f"It sends less than `fully_shard` below about {' and '.join(told)} GPUs."


def main() -> None:
    write_file(PAGE, text(plans()).encode())
    print(PAGE)


if __name__ == "__main__":
    main()
