"""Prefixes that an MLP makes in training against prefixes that are parameters themselves."""

from dataclasses import replace

from bench.papers.candidates import HEAD_RATE, Candidate
from bench.papers.prefix_variants import PREFIX, N
from bench.papers.prompt_length import GLOSSES, NAMES
from bench.papers.run import Experiment, Line

DIRECT = replace(PREFIX, rate=1e-1, options=(("n", N),))


def _with_mlp(candidate: Candidate) -> Candidate:
    return replace(candidate, rate=1e-3, head_rate=HEAD_RATE, options=(*candidate.options, ("mlp", True)))


EXPERIMENT = Experiment(
    name="reparametrisation",
    title="With and without reparametrisation",
    source="Li & Liang 2021, section 4.3; Liu et al. 2022 (P-Tuning v2), section 3.3 and figure 4",
    lines=(
        Line("MLP", PREFIX),
        Line("none", DIRECT),
        Line("MLP", _with_mlp(GLOSSES[16])),
        Line("none", GLOSSES[16]),
        Line("MLP", _with_mlp(NAMES[16])),
        Line("none", NAMES[16]),
    ),
)
