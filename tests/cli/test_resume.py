from __future__ import annotations

import pytest
import torch

import peftk
from peftk.cli.errors import UserError
from peftk.cli.resume import ADAPTER, STATE, latest_checkpoint, restore, save_checkpoint
from peftk.cli.training import Progress, Row


@pytest.fixture
def adapted(model):
    """The small Llama with an adapter whose optimizer has made a step."""
    peftk.attach(model, peftk.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    optimizer = torch.optim.AdamW(peftk.trainable_parameters(model), lr=0.1)
    for p in peftk.trainable_parameters(model):
        p.grad = torch.randn_like(p)
    optimizer.step()
    return model, optimizer


def progress(step: int) -> Progress:
    return Progress(step, [Row(0, 0, None, None, None, 3.5), Row(1, 9, 1e-3, 1 / 3, 0.1, None)], 99, 1.5)


def test_everything_comes_back(adapted, tmp_path, fresh_model):
    model, optimizer = adapted
    torch.manual_seed(123)
    checkpoint = save_checkpoint(tmp_path, model, optimizer, progress(7))
    drawn = torch.rand(3)
    other = peftk.load_adapter(fresh_model(), checkpoint / ADAPTER, is_trainable=True)
    new_optimizer = torch.optim.AdamW(peftk.trainable_parameters(other), lr=0.1)
    assert restore(checkpoint, new_optimizer) == progress(7)
    assert torch.equal(torch.rand(3), drawn)
    before, after = optimizer.state_dict()["state"], new_optimizer.state_dict()["state"]
    assert before.keys() == after.keys() and len(before) == 4
    for i in before:
        assert all(torch.equal(before[i][key], after[i][key]) for key in before[i])
    for a, b in zip(peftk.trainable_parameters(model), peftk.trainable_parameters(other), strict=True):
        assert torch.equal(a, b)


def test_the_latest_replaces_the_one_before(adapted, tmp_path):
    assert latest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, *adapted, progress(9))
    (tmp_path / "checkpoints" / ".step-000010.abc").mkdir()  # what a kill in the middle of saving leaves
    assert latest_checkpoint(tmp_path).name == "step-000009"
    save_checkpoint(tmp_path, *adapted, progress(10))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000010"]


def test_a_failed_save_leaves_the_one_before(adapted, tmp_path, monkeypatch):
    save_checkpoint(tmp_path, *adapted, progress(9))
    monkeypatch.setattr(torch, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(tmp_path, *adapted, progress(10))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000009"]


def test_a_broken_state_is_named(adapted, tmp_path):
    checkpoint = save_checkpoint(tmp_path, *adapted, progress(9))
    (checkpoint / STATE).write_bytes(b"junk")
    with pytest.raises(UserError, match="--resume: .*training.pt can't be read"):
        restore(checkpoint, adapted[1])
