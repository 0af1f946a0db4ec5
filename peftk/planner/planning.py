"""What a device has to hold at the fullest moment of a training step: a step's moments, cut over GPUs, with paging and with what
libraries take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from peftk.nn import constants_as_parameters
from peftk.optim.pages import PIECE_WITHOUT_BUDGET
from peftk.planner import narrow, overheads, traffic
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
    kinds_of_tensors,
    run,
)

SHARDINGS = ("ddp", "fsdp", "tp")
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
    """Where it runs. ``budget``: bytes of paged states that stay resident, None for what a step needs of them;
    ``keeps_freed``: on a CPU, whether malloc keeps freed memory, as `peftk finetune` sets it."""

    gpus: int = 1
    sharding: str = "ddp"  # of SHARDINGS; nothing is cut on one GPU
    paged: bool = False
    budget: int | None = None
    keeps_freed: bool = False

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"gpus: expected 1 or more, got {self.gpus}")
        if self.sharding not in SHARDINGS:
            raise ValueError(f"sharding: expected one of {', '.join(SHARDINGS)}, got {self.sharding!r}")
        if self.budget is not None and not self.paged:
            raise ValueError(f"budget: expected only with paged states, got {self.budget}")


@dataclass(frozen=True)
class Plan:
    """Bytes on one device at the fullest moment, and what it sends in a step."""

    parts: dict[str, int]
    phase: str  # in which that moment lies
    phases: dict[str, int]  # the fullest moment of each
    paged_out: int = 0  # bytes of optimizer states on the host or in a file
    collectives: dict[str, int] = field(default_factory=dict)  # bytes of the wholes, by kind (peftk.planner.traffic)
    gpus: int = 1

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def sent(self) -> int:
        """Bytes that one device puts on the wire in a step."""
        return sum(traffic.sent(self.collectives, self.gpus).values())


@dataclass(frozen=True)
class Units:
    """What FSDP2 gathers: bytes of the largest layer's parameters, of those it trains, and of all that is in no layer."""

    layer: int
    trained: int
    root: int


@dataclass(frozen=True)
class Shards:
    """What fully_shard leaves the first device of the whole: bytes by kind, and the share of what is trained."""

    held: dict[str, int]
    units: Units

    def of(self, kind: str, nbytes: int, whole: Mapping[str, int]) -> int:
        """Of so many bytes of a kind; gradients and states lie as what is trained does."""
        if kind in self.held:
            return self.held[kind]
        trained = ADAPTERS if ADAPTERS in whole else WEIGHTS
        return -(-nbytes * self.held[trained] // whole[trained]) if kind in (GRADIENTS, OPTIMIZER) else nbytes


def plan(blueprint: Blueprint, loss: Loss, step: Step, machine: Machine = Machine()) -> Plan:
    """Prediction for one device of ``machine``; ``step.batch`` is a device's own, with tensor parallelism everyone's. ValueError
    for a model that can't be split so."""
    return plans(blueprint, loss, step, [machine])[0]


def plans(blueprint: Blueprint, loss: Loss, step: Step, machines: Sequence[Machine]) -> list[Plan]:
    """``plan`` for each machine; those on which the same model computes share a run of the step."""
    runs: dict[int, tuple[Blueprint, list[Moment], int]] = {}
    found = []
    for machine in machines:
        parts = machine.gpus if machine.sharding == "tp" else 1
        if parts not in runs:
            own = part_of(blueprint, parts) if parts > 1 else blueprint
            runs[parts] = (own, *moments_of(own, loss, step))
        found.append(_plan_of(*runs[parts], step, machine))
    return found


def _plan_of(blueprint: Blueprint, moments: list[Moment], modules: int, step: Step, machine: Machine) -> Plan:
    shards = shards_of(blueprint, machine.gpus) if machine.gpus > 1 and machine.sharding == "fsdp" else None
    adjusted = [(moment.phase, _on_device(moment, step, machine, shards, modules)) for moment in moments]
    phase, parts = max(adjusted, key=lambda entry: sum(entry[1].values()))
    states = max((moment.parts for moment in moments), key=lambda parts: parts.get(OPTIMIZER, 0))
    resident = parts.get(OPTIMIZER, 0) + parts.get(WINDOW, 0)
    paged_out = max(0, _share(OPTIMIZER, states, shards) - resident) if machine.paged else 0
    phases: dict[str, int] = {}
    for name, there in adjusted:
        name = name.partition(",")[0]  # the backward pass comes in two halves, of which only the fuller one's peak is affine
        phases[name] = max(phases.get(name, 0), sum(there.values()))
    return Plan(parts, phase, phases, paged_out, collectives_of(blueprint, step, machine), machine.gpus)


def part_of(blueprint: Blueprint, gpus: int) -> Blueprint:
    """One device's, with tensor parallelism."""

    def prepare(model: nn.Module) -> None:
        blueprint.prepare(model)
        narrow.split_constants(model)

    return replace(blueprint, config=narrow.config_of_part(blueprint.config, gpus), prepare=prepare)


def moments_of(blueprint: Blueprint, loss: Loss, step: Step) -> tuple[list[Moment], int]:
    """The fullest moment of each phase, and the model's modules. A uniform model's are those of two shallow ones, and their
    difference for every layer more: the same to the byte, in a fraction of the time (tests/planner/test_planning.py)."""
    built = _sampled(blueprint)
    seen = [run(model, loss, step) for model in built]
    if len({tuple(m.phase for m in moments) for moments in seen}) > 1:
        raise RuntimeError(f"layers of {blueprint.config.model_type} are not alike: phases differ with their number")
    deep = []
    for several in zip(*seen, strict=True):
        parts = _at_depth(blueprint, [moment.parts for moment in several])
        pieces = _at_depth(blueprint, [{"": moment.pieces} for moment in several])
        deep.append(Moment(several[0].phase, parts, pieces[""]))
    return deep, _at_depth(blueprint, [{"": sum(1 for _ in model.modules())} for model in built])[""]


def collectives_of(blueprint: Blueprint, step: Step, machine: Machine) -> dict[str, int]:
    """Bytes of the wholes, by kind."""
    if machine.gpus == 1:
        return {}
    found = []
    for model in _sampled(blueprint):
        if machine.sharding == "fsdp":
            constants_as_parameters(model)
            found.append(traffic.of_fsdp(model, layers_of(model), step, machine.gpus, blueprint.dtype))
        elif machine.sharding == "tp":
            found.append(traffic.of_tensor_parallel(model, step, blueprint.dtype))
        else:
            found.append(traffic.of_ddp(model, step))
    return _at_depth(blueprint, found)


def _sampled(blueprint: Blueprint) -> list[nn.Module]:
    """The model, or, of a uniform one, the shallow ones of SAMPLED that stand for it."""
    depth = getattr(blueprint.config, "num_hidden_layers", 0)
    if not is_uniform(blueprint.config) or depth <= max(SAMPLED):
        return [blueprint.build()]
    return [blueprint.build(layers) for layers in SAMPLED]


def _at_depth(blueprint: Blueprint, of_sampled: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Figures of the model from those of ``_sampled``, each affine in the number of layers."""
    if len(of_sampled) == 1:
        return dict(of_sampled[0])
    few, more = of_sampled
    depth, (low, high) = blueprint.config.num_hidden_layers, SAMPLED
    there = {name: (few.get(name, 0), more.get(name, 0)) for name in [*few, *(name for name in more if name not in few)]}
    return {name: a + (b - a) * (depth - low) // (high - low) for name, (a, b) in there.items()}


def _on_device(moment: Moment, step: Step, machine: Machine, shards: Shards | None, modules: int) -> dict[str, int]:
    """One device's share of a moment, and what comes on top of it."""
    parts = moment.parts
    here = {kind: _share(kind, parts, shards) for kind in parts}
    if machine.paged and here.get(OPTIMIZER):
        here[WINDOW] = min(here.pop(OPTIMIZER), machine.budget or 2 * PIECE_WITHOUT_BUDGET)
    if shards is not None:
        # The layer that computes and the next one, which is fetched meanwhile; what is in no layer stays gathered from the
        # forward pass on. In the backward pass the gradients of one layer are summed over the GPUs while the next ones' arise.
        here[GATHERED] = shards.units.root + 2 * shards.units.layer
        here[BUCKETS] = 2 * shards.units.trained
    elif machine.gpus > 1 and machine.sharding == "ddp":
        here[BUCKETS] = parts.get(GRADIENTS, 0)  # DDP's buckets, beside the gradients themselves
    here |= overheads.of(step, modules, moment, machine.keeps_freed)
    return {kind: n for kind, n in here.items() if n}


def _share(kind: str, whole: Mapping[str, int], shards: Shards | None) -> int:
    nbytes = whole.get(kind, 0)
    return nbytes if shards is None else shards.of(kind, nbytes, whole)


def shards_of(blueprint: Blueprint, gpus: int) -> Shards:
    """Of a model whose constants are Parameters (peftk.nn.constants_as_parameters), on the first device, which holds the most.
    Buffers stay whole."""
    found, units = [], None
    for model in _sampled(blueprint):
        units = units_of(constants_as_parameters(model)) if units is None else units
        held: Counter[str] = Counter()
        constants_as_parameters(model)
        for kind, tensors in kinds_of_tensors(model).items():
            for tensor in tensors:
                is_split = isinstance(tensor, nn.Parameter)
                held[kind] += traffic.own_elements(tensor, gpus) * tensor.element_size() if is_split else tensor.nbytes
        found.append(held)
    return Shards(_at_depth(blueprint, found), units)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The modules that a transformers model says must not be split. ValueError for one that names none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(f"sharding: expected a model that names its layers (_no_split_modules), got {type(model).__name__}")
    return layers


def units_of(model: nn.Module) -> Units:
    """Of a transformers model, layer by layer."""
    layers = layers_of(model)
    inside = {id(p) for layer in layers for p in layer.parameters()}

    def size(parameters: Any) -> int:
        return sum(p.nbytes for p in parameters)

    return Units(
        layer=max(size(layer.parameters()) for layer in layers),
        trained=max(size(p for p in layer.parameters() if p.requires_grad) for layer in layers),
        root=size(p for p in model.parameters() if id(p) not in inside),
    )


ORDER = (WEIGHTS4, CONSTANTS, WEIGHTS, ADAPTERS, GATHERED, GRADIENTS, BUCKETS, OPTIMIZER, WINDOW)
