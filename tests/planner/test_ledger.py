"""The ledger's books against the same step on a real CPU."""

from __future__ import annotations

import pytest
import torch
from planner.conftest import narrow, preparation
from torch import nn

from peftk.cli.loss import LanguageModelLoss
from peftk.native import native
from peftk.planner import Step, plan, step
from peftk.planner import ledger as books
from peftk.planner.ledger import INSIDE, Ledger

transformers = pytest.importorskip("transformers")


def on_a_cpu(method: str, base: str, asked: Step) -> dict[str, int]:
    """Bytes at each phase's fullest moment of a step with real tensors."""
    model = transformers.AutoModelForCausalLM.from_config(narrow(), dtype=torch.bfloat16)
    preparation(method, base)(model)
    model.train()
    ledger = Ledger(model.get_output_embeddings().weight.shape[0])
    kept = step.enter_model(ledger, model, asked.optimizer_bits), step.importances_of(model)
    ledger.own(kept[1], step.IMPORTANCES)
    ids = torch.randint(0, 300, (asked.batch, asked.length))
    with step._checkpointing(model, ledger, asked):
        step._forward_backward(ledger, model, LanguageModelLoss(model), ids)
    return {moment.phase: moment.total for moment in ledger.moments()}


@pytest.mark.skipif(native() is None, reason="the reference's temporaries aren't the kernels'")
@pytest.mark.parametrize(
    ("method", "base", "checkpointing"),
    [("lora", "nf4", False), ("lora", "dense", True), ("dora", "nf4", True), ("adalora", "dense", False)]
    + [("prefix", "nf4", False), ("prompt", "dense", True), ("ptuning", "nf4", False), ("full", "dense", False)],
)
def test_the_books_are_those_of_a_cpu(blueprint, method: str, base: str, checkpointing: bool):
    asked = Step(batch=2, length=32, checkpointing=checkpointing, device_type="cpu")
    planned = step.run(blueprint(method, base).build(), LanguageModelLoss, asked)
    real = on_a_cpu(method, base, asked)
    for moment in planned:
        if moment.phase != "optimizer step":
            assert moment.total == pytest.approx(real[moment.phase], abs=1024), moment.phase  # of some 800,000: a vector or two


def test_memory_ends_with_its_tensor():
    ledger = Ledger(vocabulary=-1)
    with ledger:
        kept = torch.empty(100, device="meta")
        view = kept.view(10, 10)
        del kept
        with ledger.during("other"):
            second = torch.empty(50, device="meta")
        del view
        torch.empty(25, device="meta")
        del second
    assert [(e.nbytes, e.kind, e.end is None) for e in ledger.entries] == [
        (400, "activations", False),
        (200, "other", False),
        (100, "activations", False),
    ]
    (moment,) = ledger.moments()
    assert moment.parts == {"activations": 400, "other": 200}


def test_what_a_kernel_holds_inside():
    ledger = Ledger(vocabulary=8)
    logits = torch.empty(4, 8, device="meta")
    assert torch.ops.aten.logsumexp.default in INSIDE
    with ledger:
        logits.logsumexp(1)
    assert ledger.moments()[0].total == 4 * 8 * 4
    assert ledger.moments()[0].phase == "loss"


def test_values_are_those_of_a_batch_without_padding():
    ids = torch.empty(2, 3, dtype=torch.int64, device="meta")
    with Ledger(vocabulary=-1):
        assert bool((ids == 0).all()) and int(ids.sum()) == 0
        assert torch.empty(4, 5, device="meta")[torch.empty(4, dtype=torch.bool, device="meta")].shape == (4, 5)
        with pytest.raises(NotImplementedError, match="a mask of 2 dimensions"):
            torch.empty(4, 5, device="meta")[torch.empty(4, 5, dtype=torch.bool, device="meta")]


def test_a_model_with_memory_is_refused():
    with pytest.raises(ValueError, match="model: expected one on the meta device, got parameters with memory"):
        step.run(nn.Linear(2, 2), LanguageModelLoss, Step())


def test_grouped_queries_on_an_older_torch(blueprint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(books, "GROUPED_SINCE", (99,))
    with pytest.raises(NotImplementedError, match=r"2 key heads for 4 query heads: expected torch 2.9 or newer"):
        plan(blueprint(num_key_value_heads=2), LanguageModelLoss, Step(batch=1, length=8))
