"""What to change so that a step fits: each change by itself, and one after the other until it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from peftk.planner.planning import Machine, Plan
from peftk.planner.step import Step


@dataclass(frozen=True)
class Choice:
    """Everything that a plan is made of and that may be changed."""

    step: Step
    machine: Machine
    base: str = "nf4"  # dense or nf4
    rank: int | None = None  # None: a method without one
    method: str = "qlora"


@dataclass(frozen=True)
class Change:
    """One change. ``total``: bytes with it alone; ``after``: with it and all before it."""

    what: str
    total: int
    after: int


def changes(choice: Choice, least_rank: int = 4) -> list[tuple[str, Callable[[Choice], Choice]]]:
    """Those that are left to make, the least harmful first: what leaves the result as it is, what changes its numbers a little,
    what trains less, and more GPUs."""
    step, machine = choice.step, choice.machine
    found: list[tuple[str, Callable[[Choice], Choice]]] = []
    if not step.checkpointing:
        found.append(("--gradient-checkpointing", lambda c: replace(c, step=replace(c.step, checkpointing=True))))
    if step.batch > 1:
        told = f"--batch-size 1 with --grad-accum {step.batch * step.grad_accum}"
        fewer = {"batch": 1, "grad_accum": step.batch * step.grad_accum}
        found.append((told, lambda c: replace(c, step=replace(c.step, **fewer))))
    if not machine.paged:
        found.append(("--optimizer paged-adamw", lambda c: replace(c, machine=replace(c.machine, paged=True))))
    if choice.method == "full":
        found.append(("--method qlora", lambda c: replace(c, method="qlora", base="nf4", rank=16)))
    elif choice.base == "dense":
        found.append(("--base nf4", lambda c: replace(c, base="nf4")))
    if step.optimizer_bits == 32:
        name = "--optimizer paged-adamw8bit" if not machine.paged else "--optimizer adamw8bit, paged"
        found.append((name, lambda c: replace(c, step=replace(c.step, optimizer_bits=8), machine=replace(c.machine, paged=True))))
    if choice.rank is not None and choice.rank > least_rank:
        found.append((f"--r {least_rank}", lambda c: replace(c, rank=least_rank)))
    if step.length > 256:
        found.append((f"--seq-len {step.length // 2}", lambda c: replace(c, step=replace(c.step, length=step.length // 2))))
    if machine.gpus == 1 and step.device_type != "cpu":
        for gpus in (2, 4, 8):
            wider = {"gpus": gpus, "sharding": "fsdp"}
            found.append(
                (f"--gpus {gpus} --sharding fsdp", lambda c, wider=wider: replace(c, machine=replace(c.machine, **wider)))
            )
    return found


def advise(choice: Choice, card: int, make: Callable[[Choice], Plan]) -> list[Change]:
    """The changes in their order, up to the one with which all together fit a card of so many bytes."""
    found: list[Change] = []
    before = choice
    for what, apply in changes(choice):
        alone = make(apply(choice))
        together = make(apply(before)) if found else alone
        before = apply(before)
        found.append(Change(what, alone.total, together.total))
        if together.total <= card:
            break
    return found
