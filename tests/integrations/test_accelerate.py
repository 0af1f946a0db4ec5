"""accelerate around a model with adapters: prepare, save_state, load_state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import net, net_batch

import peftk

accelerate = pytest.importorskip("accelerate")

from peftk.integrations.accelerate import save_adapters_only  # noqa: E402


def prepared(only_adapters: bool = True):
    accelerator = accelerate.Accelerator(cpu=True)
    if only_adapters:
        save_adapters_only(accelerator)
    torch.manual_seed(2)
    model = peftk.attach(net("nf4"), peftk.LoraConfig(r=4, lora_dropout=0.2, target_modules=["q", "v"]))
    optimizer = torch.optim.AdamW(peftk.trainable_parameters(model), lr=1e-2)
    return (accelerator, *accelerator.prepare(model, optimizer))


def steps(accelerator, model, optimizer, count: int) -> list[float]:
    seen = []
    for _ in range(count):
        loss = model(**net_batch()).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


@pytest.mark.parametrize("only_adapters", [True, False])
def test_state_resumes_exactly(tmp_path: Path, only_adapters: bool):
    run = prepared(only_adapters)
    steps(*run, 2)
    run[0].save_state(str(tmp_path))
    expected = steps(*run, 3)
    again = prepared(only_adapters)
    again[0].load_state(str(tmp_path))
    assert steps(*again, 3) == expected
    theirs = dict(run[1].named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in again[1].named_parameters())
    names = {path.name for path in tmp_path.iterdir()}
    if only_adapters:
        assert {"adapter_config.json", "adapter_model.safetensors", "peftk_state.bin", "optimizer.bin"} <= names
        assert "model.safetensors" not in names
        held = torch.load(tmp_path / "peftk_state.bin", weights_only=True)
        assert set(held) == {n for n, p in run[1].named_parameters() if p.requires_grad} | {"peftk_adapters_only"}


def test_adalora_goes_on_behind_the_last_pruning(tmp_path: Path):
    """The pruned triplets are gone from the state that is loaded; ranks and history come with it."""

    def started():
        accelerator = accelerate.Accelerator(cpu=True)
        save_adapters_only(accelerator)
        torch.manual_seed(2)
        config = peftk.AdaLoraConfig(init_r=4, target_r=2, total_step=4, tfinal=2, target_modules=["q", "v"])
        model = peftk.attach(net("nf4"), config)
        optimizer = torch.optim.AdamW(peftk.trainable_parameters(model), lr=1e-2, fused=True)
        run = accelerator, *accelerator.prepare(model, optimizer)
        return run, peftk.adalora_schedule(*run[1:])

    run, schedule = started()
    steps(*run, 3)
    run[0].save_state(str(tmp_path))
    expected = steps(*run, 3)
    again, other = started()
    again[0].load_state(str(tmp_path))
    assert steps(*again, 3) == expected and other.history == schedule.history and other.step == 6
    assert sum(len(p) for name, p in again[1].named_parameters() if "lora_E" in name) == 8


def test_two_models(tmp_path: Path):
    """The second has a folder of its own; one without adapters is saved as accelerate does."""
    accelerator, *_ = run = prepared()
    plain = accelerator.prepare(torch.nn.Linear(2, 2))
    weight = plain.weight.detach().clone()
    second = accelerator.prepare(peftk.attach(net("nf4"), peftk.LoraConfig(r=2, target_modules=["q"])))
    accelerator.save_state(str(tmp_path))
    before = {name: p.clone() for name, p in second.named_parameters()}
    with torch.no_grad():
        for p in [*peftk.trainable_parameters(second), *peftk.trainable_parameters(run[1]), plain.weight]:
            p.add_(1.0)
    accelerator.load_state(str(tmp_path))
    assert torch.equal(plain.weight, weight)
    assert all(torch.equal(p, before[name]) for name, p in second.named_parameters())
    assert (tmp_path / "model_2" / "adapter_config.json").exists()


def test_another_adapter_is_refused(tmp_path: Path):
    run = prepared()
    run[0].save_state(str(tmp_path))
    accelerator = accelerate.Accelerator(cpu=True)
    save_adapters_only(accelerator)
    accelerator.prepare(peftk.attach(net("nf4"), peftk.LoraConfig(r=4, target_modules=["q"])))
    with pytest.raises(ValueError, match=r"checkpoint: expected the tensors of the model's adapters, got none for \[\]"):
        accelerator.load_state(str(tmp_path))
