"""Prefix against infix against trained vectors at the input only."""

from bench.papers.candidates import Candidate
from bench.papers.run import Experiment, Line

N, STEPS = 10, 24
COMMON = {"task": "define", "method": "prefix tuning", "steps": STEPS, "batch": 6}
PREFIX = Candidate(**COMMON, rate=2e-3, options=(("n", N), ("mlp", True)))

EXPERIMENT = Experiment(
    name="prefix_variants",
    title="Prefix, infix, embedding only",
    source="Li & Liang 2021, sections 7.2 and 7.3, table 4",
    lines=(
        Line("words only", Candidate(task="define", method="hard template", rate=0.0, steps=0)),
        Line("prefix", PREFIX),
        Line("infix", Candidate(**COMMON, rate=2e-3, options=(("n", N), ("variant", "infix"), ("mlp", True)))),
        Line("embedding only", Candidate(**COMMON, rate=2e-3, options=(("n", N), ("variant", "embedding"), ("mlp", True)))),
    ),
)
