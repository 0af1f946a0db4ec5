"""Prefix against infix against trained vectors at the input only."""

from bench.papers.candidates import Candidate
from bench.papers.run import Experiment, Line

N, STEPS = 10, 36
COMMON = {"task": "define", "method": "prefix tuning", "steps": STEPS, "batch": 8}
PREFIX = Candidate(**COMMON, rate=1e-3, options=(("n", N), ("mlp", True)))

EXPERIMENT = Experiment(
    name="prefix_variants",
    title="Prefix, infix, embedding only",
    source="Li & Liang 2021, sections 7.2 and 7.3, table 4",
    lines=(
        Line("prefix", PREFIX),
        Line("infix", Candidate(**COMMON, rate=1e-3, options=(("n", N), ("variant", "infix"), ("mlp", True)))),
        Line("embedding only", Candidate(**COMMON, rate=1e-3, options=(("n", N), ("variant", "embedding"), ("mlp", True)))),
    ),
)
