"""How long a prompt in every layer should be: a simple classification against tagging."""

from bench.papers.candidates import Candidate
from bench.papers.run import Experiment, Line

LENGTHS = (1, 4, 16, 64)
COMMON = {"method": "P-Tuning v2", "rate": 5e-2, "steps": 60}
GLOSSES = {n: Candidate(task="glosses", options=(("n", n),), **COMMON) for n in LENGTHS}
NAMES = {n: Candidate(task="names", options=(("n", n),), **COMMON) for n in LENGTHS}

EXPERIMENT = Experiment(
    name="prompt_length",
    title="Prompt length",
    source="Liu et al. 2022 (P-Tuning v2), section 3.3 and figure 4",
    lines=tuple(Line(f"{n} tokens", made[n], n) for made in (GLOSSES, NAMES) for n in LENGTHS),
    axis="prompt length",
)
