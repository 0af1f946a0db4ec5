"""What makes P-Tuning's virtual tokens: an LSTM and an MLP, an MLP, or nothing."""

from bench.papers.probing import LSTM, MLP, NONE
from bench.papers.run import Experiment, Line

EXPERIMENT = Experiment(
    name="prompt_encoder",
    title="P-Tuning's encoder",
    source="Liu et al. 2021 (P-Tuning), section 3.2",
    lines=(Line("LSTM and MLP", LSTM), Line("MLP", MLP), Line("none", NONE)),
)
