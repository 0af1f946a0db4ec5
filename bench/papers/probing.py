"""Knowledge probing: a hard template against P-Tuning in its words' places, and P-Tuning's encoders."""

from bench.papers.candidates import Candidate
from bench.papers.run import Experiment, Line

STEPS, RATE = 40, 1e-2


def p_tuning(encoder: str, rate: float = RATE) -> Candidate:
    """A virtual token for each of the template's, starting from its word."""
    return Candidate(task="kinds", method="P-Tuning", rate=rate, steps=STEPS, options=(("encoder", encoder),))


HARD = Candidate(task="kinds", method="hard template", rate=0.0, steps=0)
LSTM, MLP, NONE = p_tuning("LSTM"), p_tuning("MLP"), p_tuning("NONE", 0.1)

EXPERIMENT = Experiment(
    name="probing",
    title="Knowledge probing: x is a kind of ...",
    source="Liu et al. 2021 (P-Tuning), section 4.1 and table 1",
    lines=(Line("hard template", HARD), Line("P-Tuning (LSTM)", LSTM)),
)
