"""How much of what LoRA in bf16 gains over the untuned NF4 model QLoRA gains as well."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.papers.candidates import Candidate
from bench.papers.run import Experiment, Line, Row

GOAL = 0.8
# The paper's adapter (section 4, appendix B.2), and a rate ten times its 2e-4, as steps are few: the best of four
# for LoRA in bf16, which QLoRA is held against.
ADAPTER = (("r", 64), ("alpha", 16), ("dropout", 0.1))
COMMON = {"task": "define-dense", "rate": 2e-3, "steps": 24, "batch": 6}

UNTUNED = Line("NF4, untuned", Candidate("define-dense", "hard template", 0.0, 0, (("nf4", True),)))
LORA = Line("bf16, LoRA", Candidate(**COMMON, method="LoRA", options=ADAPTER))
QLORA = Line("NF4, QLoRA", Candidate(**COMMON, method="QLoRA", options=ADAPTER))


def closed(untuned: float, lora: float, qlora: float) -> float:
    """Of the gap between the untuned NF4 model's loss and LoRA's, QLoRA's share: 1 where it ends with the same loss. ValueError
    where LoRA gains nothing."""
    if not lora < untuned:
        raise ValueError(f"lora: expected a loss below the untuned model's {untuned:.3f}, got {lora:.3f}: there is no gap")
    return (untuned - qlora) / (untuned - lora)


def conclusion(rows: Sequence[Row]) -> str:
    """The three losses, means of the seeds, and the share of the gap that QLoRA closes."""
    untuned, lora, qlora = (statistics.fmean(row.score for row in rows if row.line == line) for line in (UNTUNED, LORA, QLORA))
    told = f"Held-out loss in nats a token: NF4 untuned {untuned:.3f}, LoRA in bf16 {lora:.3f}, QLoRA {qlora:.3f}."
    if not lora < untuned:
        return f"{told} LoRA gains nothing: there is no gap."
    share = closed(untuned, lora, qlora)
    return f"{told} QLoRA closes {share:.1%} of the gap; goal >= {GOAL:.0%}: {'met' if share >= GOAL else 'missed'}."


EXPERIMENT = Experiment(
    name="qlora_gap",
    title="QLoRA against LoRA in bf16",
    source="Dettmers et al. 2023, section 4, tables 3 and 4",
    lines=(UNTUNED, Line("bf16, untuned", Candidate("define-dense", "hard template", 0.0, 0)), LORA, QLORA),
    conclusion=conclusion,
)
