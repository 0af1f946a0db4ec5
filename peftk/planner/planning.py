"""What a device has to hold at the fullest moment of a training step: a step's moments, cut over GPUs, with paging and with what
libraries take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftk.optim.pages import PIECE_WITHOUT_BUDGET
from peftk.planner import overheads
from peftk.planner.geometries import is_uniform, skeleton, with_layers
from peftk.planner.ledger import Moment
from peftk.planner.step import (
    ADAPTERS,
    CONSTANTS,
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
    WEIGHTS4,
    Loss,
    Step,
    run,
)

SHARDINGS = ("ddp", "fsdp")
GATHERED, BUCKETS, WINDOW = "gathered weights", "gradients in flight", "paging window"
SAMPLED = 2, 4  # layers of the two models that stand for a uniform one of any depth


@dataclass(frozen=True)
class Blueprint:
    """A model to be trained. ``prepare`` does to a fresh skeleton what a program does to a loaded model: 4 bits, adapter, what
    is trained."""

    config: Any  # transformers'
    dtype: torch.dtype
    prepare: Callable[[nn.Module], Any]

    def build(self, layers: int | None = None) -> nn.Module:
        """On the meta device, in training mode; with so many layers, None for the config's own."""
        model = skeleton(self.config if layers is None else with_layers(self.config, layers), self.dtype)
        self.prepare(model)
        return model.train()


@dataclass(frozen=True)
class Machine:
    """Where it runs. ``budget``: bytes of paged states that stay resident, None for what a step needs of them."""

    gpus: int = 1
    sharding: str = "ddp"  # of SHARDINGS; nothing is cut on one GPU
    paged: bool = False
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"gpus: expected 1 or more, got {self.gpus}")
        if self.sharding not in SHARDINGS:
            raise ValueError(f"sharding: expected one of {', '.join(SHARDINGS)}, got {self.sharding!r}")
        if self.budget is not None and not self.paged:
            raise ValueError(f"budget: expected only with paged states, got {self.budget}")


@dataclass(frozen=True)
class Plan:
    """Bytes on one device at the fullest moment."""

    parts: dict[str, int]
    phase: str  # in which that moment lies
    phases: dict[str, int]  # the fullest moment of each
    paged_out: int = 0  # bytes of optimizer states on the host or in a file
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Units:
    """What FSDP2 gathers: bytes of the largest layer's parameters, of those it trains, and of all that is in no layer."""

    layer: int
    trained: int
    root: int


def plan(blueprint: Blueprint, loss: Loss, step: Step, machine: Machine = Machine()) -> Plan:
    """Prediction for one device of ``machine``; ``step.batch`` is a device's own."""
    moments, modules = moments_of(blueprint, loss, step)
    units = units_of(blueprint.build(SAMPLED[0])) if machine.gpus > 1 and machine.sharding == "fsdp" else None
    adjusted = [(moment.phase, _on_device(moment, step, machine, units, modules)) for moment in moments]
    phase, parts = max(adjusted, key=lambda entry: sum(entry[1].values()))
    states = max(moment.parts.get(OPTIMIZER, 0) for moment in moments)
    resident = parts.get(OPTIMIZER, 0) + parts.get(WINDOW, 0)
    paged_out = max(0, _share(states, machine, units) - resident) if machine.paged else 0
    phases: dict[str, int] = {}
    for name, there in adjusted:
        name = name.partition(",")[0]  # the backward pass comes in two halves, of which only the fuller one's peak is affine
        phases[name] = max(phases.get(name, 0), sum(there.values()))
    return Plan(parts, phase, phases, paged_out)


def moments_of(blueprint: Blueprint, loss: Loss, step: Step) -> tuple[list[Moment], int]:
    """The fullest moment of each phase, and the model's modules. A uniform model's are those of two shallow ones, and their
    difference for every layer more: the same to the byte, in a fraction of the time (tests/planner/test_planning.py)."""
    depth = getattr(blueprint.config, "num_hidden_layers", 0)
    if not is_uniform(blueprint.config) or depth <= max(SAMPLED):
        model = blueprint.build()
        return run(model, loss, step), _count(model)
    few, more = (blueprint.build(layers) for layers in SAMPLED)
    low, high = run(few, loss, step), run(more, loss, step)
    if [m.phase for m in low] != [m.phase for m in high]:
        raise RuntimeError(
            f"layers of {blueprint.config.model_type} are not alike: phases differ with their number; expected layers of one kind"
        )

    def at_depth(a: int, b: int) -> int:
        return a + (b - a) * (depth - SAMPLED[0]) // (SAMPLED[1] - SAMPLED[0])

    deep = []
    for a, b in zip(low, high, strict=True):
        kinds = dict.fromkeys([*a.parts, *b.parts])
        parts = {kind: at_depth(a.parts.get(kind, 0), b.parts.get(kind, 0)) for kind in kinds}
        deep.append(Moment(a.phase, parts, at_depth(a.pieces, b.pieces)))
    return deep, at_depth(_count(few), _count(more))


def _count(model: nn.Module) -> int:
    return sum(1 for _ in model.modules())


def _on_device(moment: Moment, step: Step, machine: Machine, units: Units | None, modules: int) -> dict[str, int]:
    """One device's share of a moment, and what comes on top of it."""
    parts = moment.parts
    cut = (WEIGHTS4, WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER)
    here = {kind: _share(n, machine, units) if kind in cut else n for kind, n in parts.items()}
    if machine.paged and here.get(OPTIMIZER):
        here[WINDOW] = min(here.pop(OPTIMIZER), machine.budget or 2 * PIECE_WITHOUT_BUDGET)
    if units is not None:
        # The layer that computes and the next one, which is fetched meanwhile; what is in no layer stays gathered from the
        # forward pass on. In the backward pass the gradients of one layer are summed over the GPUs while the next ones' arise.
        here[GATHERED] = units.root + 2 * units.layer
        here[BUCKETS] = 2 * units.trained
    elif machine.gpus > 1:
        here[BUCKETS] = parts.get(GRADIENTS, 0)  # DDP's buckets, beside the gradients themselves
    here |= overheads.of(step, modules, moment.pieces)
    return {kind: n for kind, n in here.items() if n}


def _share(nbytes: int, machine: Machine, units: Units | None) -> int:
    return nbytes if units is None else -(-nbytes // machine.gpus)


def units_of(model: nn.Module) -> Units:
    """Of a transformers model: its layers are the modules that it says must not be split. Constants of 4-bit weights are buffers,
    which FSDP2 leaves whole on every GPU."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(f"sharding: expected a model that names its layers (_no_split_modules), got {type(model).__name__}")
    inside = {id(p) for layer in layers for p in layer.parameters()}

    def size(parameters: Any) -> int:
        return sum(p.nbytes for p in parameters)

    return Units(
        layer=max(size(layer.parameters()) for layer in layers),
        trained=max(size(p for p in layer.parameters() if p.requires_grad) for layer in layers),
        root=size(p for p in model.parameters() if id(p) not in inside),
    )


ORDER = (WEIGHTS4, CONSTANTS, WEIGHTS, ADAPTERS, GATHERED, GRADIENTS, BUCKETS, OPTIMIZER, WINDOW)
