from __future__ import annotations

from dataclasses import replace

import pytest

from peftk.planner import Choice, Machine, Plan, Step
from peftk.planner.advice import advise, changes

CHOICE = Choice(Step(batch=4, length=512), Machine(), "dense", 16, "lora")


def test_the_least_harmful_first():
    assert [what for what, _ in changes(CHOICE)] == [
        "--gradient-checkpointing",
        "--batch-size 1 with --grad-accum 4",
        "--optimizer paged-adamw",
        "--base nf4",
        "--optimizer paged-adamw8bit",
        "--r 4",
        "--seq-len 256",
        "--gpus 2 --sharding fsdp",
        "--gpus 4 --sharding fsdp",
        "--gpus 8 --sharding fsdp",
    ]


def test_what_is_done_is_not_advised_again():
    done = Choice(Step(1, 256, checkpointing=True, optimizer_bits=8, device_type="cpu"), Machine(paged=True), "nf4", 4, "qlora")
    assert changes(done) == []
    assert "--method qlora" in [what for what, _ in changes(Choice(Step(), Machine(), "dense", None, "full"))]


def made(choice: Choice) -> Plan:
    size = 100 * choice.step.batch if choice.step.checkpointing else 150 * choice.step.batch
    return Plan({"all": size + (0 if choice.machine.paged else 50)}, "forward", {})


@pytest.mark.parametrize(("card", "count"), [(460, 1), (160, 2), (100, 3)])
def test_one_after_the_other_until_it_fits(card: int, count: int):
    found = advise(CHOICE, card, made)
    assert len(found) == count and found[-1].after <= card
    assert all(change.after > card for change in found[:-1])
    assert [(c.total, c.after) for c in found] == [(450, 450), (200, 150), (600, 100)][:count]


def test_where_nothing_helps():
    found = advise(replace(CHOICE, step=replace(CHOICE.step, device_type="cpu")), 10, made)
    assert found[-1].after > 10 and not any("--gpus" in change.what for change in found)
