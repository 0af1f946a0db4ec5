"""LoRA's rank against the matrices that get an adapter."""

from bench.papers.candidates import HEAD_RATE, MODULES, Candidate
from bench.papers.run import Experiment, Line

RANKS = (1, 2, 4, 8, 64)
COMMON = {"task": "glosses", "method": "LoRA", "rate": 4e-3, "steps": 60, "head_rate": HEAD_RATE}

EXPERIMENT = Experiment(
    name="lora_rank",
    title="LoRA: rank and matrices",
    source="Hu et al. 2021, section 7.1 and 7.2, tables 5 and 6",
    lines=tuple(
        Line(f"{modules}; r = {r}", Candidate(**COMMON, options=(("r", r), ("modules", modules))), r, modules)
        for modules in MODULES
        for r in RANKS
    ),
    axis="rank",
)
