"""What a soft prompt starts from."""

from bench.papers.candidates import Candidate
from bench.papers.run import Experiment, Line

N, STEPS = 5, 30
TEXT = "Every word names a thing of some kind"


def prompt(init: str, **more: str) -> Candidate:
    """Prompt Tuning of N vectors in front of the template."""
    options = (("n", N), ("init", init), *more.items())
    return Candidate(task="kinds", method="prompt tuning", rate=0.1, steps=STEPS, options=options, batch=8)


VOCABULARY = prompt("SAMPLE_VOCAB")

EXPERIMENT = Experiment(
    name="prompt_init",
    title="What a soft prompt starts from",
    source="Lester et al. 2021, section 3.2 and figure 3b",
    lines=(
        Line("random, N(0, 1)", prompt("RANDOM")),
        Line("sampled vocabulary", VOCABULARY),
        Line("text", prompt("TEXT", text=TEXT)),
        Line("class labels", prompt("CLASS_LABELS")),
    ),
)
