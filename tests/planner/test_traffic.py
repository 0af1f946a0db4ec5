"""Figures that can be done by hand; and all of it beside the collectives of processes that run."""

from __future__ import annotations

import pytest
from distributed.processes import run

from bench import distributed_step
from peftk.cli.loss import LanguageModelLoss
from peftk.planner import Machine, Step, plan
from peftk.planner.planning import ADAPTERS
from peftk.planner.step import OPTIMIZER
from peftk.planner.traffic import GATHER, REDUCE, SCATTER, sent

SIZE, RANKS = 512, 2
SHORT = Step(batch=2, length=32)
CASES = [("ddp", False), ("fsdp", False), ("tp", False), ("tp", True)]


def assert_as_planned(ranks: int, size: int, cases: list[tuple[str, bool]]) -> None:
    plans = [distributed_step.planned(engine, ranks, size, again) for engine, again in cases]
    for told in run(ranks, ("counted", {"size": size, "cases": cases}))["counted"]:
        for case, found, planned in zip(cases, told, plans, strict=True):
            assert found["collectives"] == planned.collectives, case
            held = found["held"]
            assert OPTIMIZER in held and held == {kind: planned.parts[kind] for kind in held}, case
            assert found["losses"][0] == pytest.approx(told[0]["losses"][0], rel=0.05), case  # tp has another batch


def test_what_is_planned_is_what_two_processes_hold_and_send():
    assert_as_planned(RANKS, SIZE, CASES)


@pytest.mark.full
def test_what_is_planned_is_what_four_processes_hold_and_send():
    assert_as_planned(4, 2 * SIZE, [("fsdp", True), ("tp", False)])


def test_rings():
    assert sent({GATHER: 800, SCATTER: 80, REDUCE: 8}, 4) == {GATHER: 600, SCATTER: 60, REDUCE: 12}
    assert sent({GATHER: 800}, 1) == {GATHER: 0}


def test_by_hand(blueprint):
    """Gradients of adapters, and weights twice a step but for what is in no layer."""
    made = blueprint(layers=6)
    adapters = plan(made, LanguageModelLoss, SHORT).parts[ADAPTERS]
    ddp = plan(made, LanguageModelLoss, SHORT, Machine(gpus=4))
    assert ddp.collectives == {REDUCE: adapters} and ddp.sent == 2 * adapters * 3 // 4
    accumulated = plan(made, LanguageModelLoss, Step(2, 32, grad_accum=3), Machine(gpus=4))
    assert accumulated.collectives == {REDUCE: 3 * adapters}
    dense = blueprint("full", "dense", layers=6)
    fsdp = plan(dense, LanguageModelLoss, SHORT, Machine(gpus=2, sharding="fsdp"))
    sizes = {name: p.numel() for name, p in dense.build().named_parameters()}
    inside = sum(n for name, n in sizes.items() if ".layers." in name)
    assert fsdp.collectives == {GATHER: 2 * (sum(sizes.values()) + inside), SCATTER: 4 * sum(sizes.values())}


def test_checkpointing_sums_an_activation_a_layer_more(blueprint):
    made = blueprint(layers=6, num_key_value_heads=4, intermediate_size=256)
    plain, again = (
        plan(made, LanguageModelLoss, Step(2, 32, checkpointing), Machine(gpus=2, sharding="tp")).collectives[REDUCE]
        for checkpointing in (False, True)
    )
    assert again - plain == (6 + 1) * (2 * 32) * 128 * 2  # and of the first layer's input the gradient
