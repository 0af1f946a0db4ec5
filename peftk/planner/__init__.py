"""The memory of a training step before it runs: the bytes at its fullest moment, on a CPU, on a GPU, on each of several; and what
each of several sends.

The step itself is run, on the meta device, where tensors have shapes and no memory: the model that transformers builds from a
config, the program's own preparation, loss and backward pass. So the figures are exact for any architecture and method, and
follow the code when it changes; a formula would have to be kept for each of them. No weights are read.
"""

from peftk.planner import picture
from peftk.planner.advice import Change, Choice, advise
from peftk.planner.cards import CARDS, card_of, size_of
from peftk.planner.geometries import GEOMETRIES, config_of
from peftk.planner.planning import SHARDINGS, Blueprint, Machine, Plan, plan, plans
from peftk.planner.step import KINDS, Step

__all__ = [
    "CARDS",
    "GEOMETRIES",
    "KINDS",
    "SHARDINGS",
    "Blueprint",
    "Change",
    "Choice",
    "Machine",
    "Plan",
    "Step",
    "advise",
    "card_of",
    "config_of",
    "picture",
    "plan",
    "plans",
    "size_of",
]
