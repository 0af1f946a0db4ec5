"""bench/models/bench_optimizer_quality.py on a tiny model of the same architecture."""

import pytest
import torch

from bench.limits import Limits
from bench.models import bench_optimizer_quality as bench

LIMITS = Limits(1e9, 1e9, 1e9, {torch.bfloat16: 1e9, torch.float32: 1e9})


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=61, max_position_embeddings=32)
    ids = torch.randint(0, 61, (6, 16), generator=torch.Generator().manual_seed(0))

    def fresh():
        torch.manual_seed(3)
        return transformers.LlamaForCausalLM(config)

    monkeypatch.setattr(bench, "fresh_model", fresh)
    monkeypatch.setattr(bench, "data", lambda: (ids[:4], ids[4:]))


def test_losses_beside_32_bits():
    eight, paged, both = (row for (row,) in bench.rows(0, 1, LIMITS))
    assert [row.case.partition(", SmolLM2")[0] for row in (eight, paged, both)] == ["8 bits", "paged", "8 bits, paged"]
    assert paged.error == 0 and 0 < eight.error == both.error < bench.MOST
    assert all(row.verdicts[0].met and row.verdicts[0].goal == "<= 0.5% from 32 bits" for row in (eight, paged, both))


def test_a_loss_that_is_too_far_is_missed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "train", lambda *_: None)
    losses = iter((4.0, 2.0, 2.02, 2.0, 1.0))
    monkeypatch.setattr(bench, "loss_on", lambda *_: next(losses))
    eight, paged, both = (row for (row,) in bench.rows(0, 1, LIMITS))
    assert [row.verdicts[0].met for row in (eight, paged, both)] == [False, True, False]
    assert eight.note == "held-out loss 4.0000 -> 2.0200, with 32 bits 2.0000"
