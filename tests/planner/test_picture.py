from __future__ import annotations

import struct

import pytest

from peftk.planner import KINDS, Plan
from peftk.planner.picture import COLOURS, draw, kinds_of
from peftk.planner.planning import ORDER

pytest.importorskip("matplotlib")


def test_every_kind_has_a_colour_of_its_own():
    assert {*KINDS, *ORDER, "driver and libraries", "process", "holes in the heap"} == set(COLOURS)


def test_the_order_is_one_for_all():
    plans = [Plan({"logits": 1, "weights, dense": 2}, "", {}), Plan({"adapters": 3, "weights, 4 bits": 1}, "", {})]
    assert kinds_of(plans) == ["weights, 4 bits", "weights, dense", "adapters", "logits"]


def test_a_picture(tmp_path):
    bars = [
        ("7B", Plan({"weights, 4 bits": 4 * 10**9, "activations": 10**9}, "loss", {})),
        ("13B", Plan({"logits": 10**9}, "", {})),
    ]
    draw(tmp_path / "plan.png", bars, [("24 GB", 24 * 10**9)], "two models")
    content = (tmp_path / "plan.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", content[16:24])) > 400
