"""Pages say what the code says now."""

import pytest

from bench.pages import llama_65b
from peftk.planner import Plan

pytest.importorskip("transformers")


def test_llama_65b():
    assert llama_65b.text(llama_65b.plans()) == llama_65b.PAGE.read_text(), "python -m bench.pages.llama_65b writes it anew"


def test_lines():
    plan = Plan({"weights, 4 bits": 3 * 10**9, "logits": 10**9}, "loss", {}, collectives={"all-reduce": 8 * 10**9}, gpus=2)
    assert llama_65b._line(2, "ddp", plan) == "| 2 | DDP | 3.00 | – | – | 4.00 | rtx-3060 | 8.00 GB | 7.81 MB |"
    assert "| can't be split so: gpus: odd | – | – |" in llama_65b._line(3, "tp", "gpus: odd")
