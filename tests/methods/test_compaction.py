"""Pruned triplets removed: what the model computes stays; parameters, optimizer state and time fall."""

from __future__ import annotations

import time

import pytest
import torch
from tiny_models import Net, fill, net_batch, run, state_of, weight_grads
from torch import nn

import peftk
from peftk.checkpoint import adapter_tensors
from peftk.optim.moments import bits_of, converted


def config(**changes) -> peftk.AdaLoraConfig:
    fields = {"total_step": 10, "tfinal": 4, "init_r": 4, "target_r": 2, "target_modules": ["q", "v"]}
    return peftk.AdaLoraConfig(**{**fields, **changes})


def trained(optimizer_class=torch.optim.AdamW, base: str = "dense") -> tuple[nn.Module, torch.optim.Optimizer]:
    """By hand up to the last pruning."""
    torch.manual_seed(0)
    model = Net()
    if base == "nf4":
        peftk.quantize_model(model, progress=False)
    fill(peftk.attach(model, config()))
    optimizer = optimizer_class(peftk.trainable_parameters(model), lr=0.01)
    for step in range(1, 7):
        optimizer.zero_grad()
        weight_grads(model, "net")
        optimizer.step()
        peftk.update_and_allocate(model, step)
    return model, optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_the_model_computes_what_it_did(base):
    model, optimizer = trained(base=base)
    y, parameters = run(model, "net"), peftk.trainable_parameters(model)
    masks = {path: rows.clone() for path, rows in peftk.rank_allocator(model).kept.items()}
    before = {path: tuple(t.detach().clone() for t in model.get_submodule(path).triplets("default")) for path in masks}
    states = state_bytes(optimizer)
    assert peftk.compact(model, optimizer) is model
    torch.testing.assert_close(run(model, "net"), y, rtol=1e-5, atol=1e-5)
    assert [id(p) for p in peftk.trainable_parameters(model)] == [id(p) for p in parameters]
    layers = {path: model.get_submodule(path) for path in masks}
    sizes = {path: layer.in_features + layer.out_features + 1 for path, layer in layers.items()}  # of a triplet
    assert peftk.report(model).trainable.elements == sum(int(rows.sum()) * sizes[path] for path, rows in masks.items())
    assert sum(int(rows.sum()) for rows in masks.values()) == 8 and state_bytes(optimizer) < 0.55 * states
    for path, (A, E, B) in before.items():
        layer, rows = model.get_submodule(path), masks[path]
        assert torch.equal(layer.lora_A["default"], A[rows]) and torch.equal(layer.lora_E["default"], E[rows])
        assert torch.equal(layer.lora_B["default"], B[:, rows])
    pattern = peftk.rank_allocator(model).config.rank_pattern
    assert pattern == {f"{path}.lora_E": rows.tolist() for path, rows in masks.items()}


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_training_goes_on_as_if_the_rows_were_held_at_0(optimizer_class):
    """Where the regulariser is left out, rows held at 0 and rows that are gone are the same training."""
    held, optimizer = trained(optimizer_class)
    cut, cut_optimizer = trained(optimizer_class)
    peftk.compact(cut, cut_optimizer)
    for step in range(7, 11):
        for model, each in ((held, optimizer), (cut, cut_optimizer)):
            each.zero_grad()
            weight_grads(model, "net")
            each.step()
            peftk.update_and_allocate(model, step)
        torch.testing.assert_close(run(held, "net"), run(cut, "net"), rtol=1e-4, atol=1e-4)


class Halved(torch.optim.SGD):
    """Keeps a moment at half the size; torch would not know how to cut it."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for p in self.param_groups[0]["params"] if p.grad is not None):
            self.state[p].setdefault("packed", torch.zeros(-(-p.numel() // 2)))

    def cut_state(self, parameter: nn.Parameter, dim: int, index: torch.Tensor) -> None:
        assert parameter.shape[dim] == len(index)  # it has its new shape
        self.state[parameter] = {"packed": torch.zeros(-(-parameter.numel() // 2)), "kept": index}


def test_an_optimizer_may_cut_its_state_itself():
    model, optimizer = trained(Halved)
    masks = {path: rows.clone() for path, rows in peftk.rank_allocator(model).kept.items()}
    peftk.compact(model, optimizer)
    for path, rows in masks.items():
        for p in model.get_submodule(path).triplets("default") if not rows.all() else ():
            assert torch.equal(optimizer.state[p]["kept"], rows.nonzero()[:, 0])
            assert optimizer.state[p]["packed"].numel() == -(-p.numel() // 2)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("bits", [32, 8])
def test_our_own_optimizer(bits, paged):
    """Its 8-bit moments have another layout than the parameter."""
    options = {"bits": bits, "min_8bit_size": 1, "paged": paged}
    model, optimizer = trained(lambda parameters, lr: peftk.optim.AdamW(parameters, lr, **options))
    masks = {path: rows.clone() for path, rows in peftk.rank_allocator(model).kept.items()}
    before = {p: converted(dict(state), 32) for p, state in optimizer.state.items()}
    peftk.compact(model, optimizer)
    for path, rows in masks.items():
        for p, dim in zip(model.get_submodule(path).triplets("default"), (0, 0, 1), strict=True):
            if not rows.any():
                assert p not in optimizer.state
                continue
            assert bits_of(optimizer.state[p]) == bits and optimizer.state[p]["step"] == 6
            after = converted(dict(optimizer.state[p]), 32)
            for key in ("exp_avg", "exp_avg_sq"):
                kept = before[p][key].index_select(dim, rows.nonzero()[:, 0])
                atol = 0.03 * kept.abs().max().item() if bits == 8 else 0  # coded twice, in blocks that begin elsewhere
                torch.testing.assert_close(after[key], kept, rtol=0, atol=atol)
    optimizer.zero_grad()
    weight_grads(model, "net")
    optimizer.step()
    assert run(model, "net").isfinite().all()


def test_our_own_optimizer_forgets_what_is_empty():
    p = nn.Parameter(torch.randn(4, 3))
    optimizer = peftk.optim.AdamW([p], bits=8, min_8bit_size=1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad, p.data = None, p.data[:0]
    optimizer.cut_state(p, 0, torch.zeros(0, dtype=torch.long))
    assert p not in optimizer.state


def test_a_living_loss_does_not_keep_the_old_shape():
    model, optimizer = trained()
    loss = run(model, "net").sum()
    loss.backward()
    peftk.compact(model, optimizer)
    assert all(p.grad is None for p in peftk.trainable_parameters(model))
    run(model, "net").sum().backward()
    for p in peftk.trainable_parameters(model):
        assert p.numel() == 0 or p.grad.shape == p.shape


def test_ranks_stay_after_it():
    model, optimizer = trained()
    ranks = peftk.rank_allocator(model).ranks()
    peftk.compact(model, optimizer)
    weight_grads(model, "net")
    assert peftk.update_and_allocate(model, 7) == ranks
    shapes = [p.shape for p in peftk.trainable_parameters(model)]
    peftk.compact(model, optimizer)
    assert [p.shape for p in peftk.trainable_parameters(model)] == shapes


def test_files_after_it(tmp_path):
    model, _ = trained()
    y = run(model, "net")
    peftk.compact(model)
    peftk.save_adapter(model, tmp_path / "a")
    torch.manual_seed(0)
    again = peftk.load_adapter(Net(), tmp_path / "a", is_trainable=True)
    torch.testing.assert_close(run(again, "net"), y, rtol=1e-5, atol=1e-5)
    weight_grads(again, "net")
    assert peftk.update_and_allocate(again, 1) == peftk.rank_allocator(model).ranks()  # final: nothing is pruned any more


def test_an_adapter_from_a_file_loses_its_zeros(tmp_path):
    model, _ = trained()
    peftk.save_adapter(model, tmp_path / "a")  # whole: values are 0, rows are there
    torch.manual_seed(0)
    again = peftk.load_adapter(Net(), tmp_path / "a")
    assert again.layers[0]["q"].rank("default") == 4
    peftk.compact(again)
    torch.testing.assert_close(run(again, "net"), run(model, "net"), rtol=1e-5, atol=1e-5)
    assert sum(len(t) for key, t in adapter_tensors(again, "default").items() if key.endswith("lora_E")) == 8


def test_merged_and_compacted():
    model, _ = trained()
    y, plain = run(model, "net"), {key: value.clone() for key, value in model.state_dict().items() if "base_layer" in key}
    peftk.compact(peftk.merge(model))
    torch.testing.assert_close(run(model, "net"), y, rtol=1e-4, atol=1e-5)
    peftk.unmerge(model)
    torch.testing.assert_close(run(model, "net"), y, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in plain.items())


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        ("fresh", "adapter_name: expected an adapter that was trained, got 'default', all of whose values are 0"),
        ("early", r"got 'default' after step 1; they are after step 6 \(total_step - tfinal\)"),
        ("factored", r"optimizer: expected states of the parameter's shape \(4, 32\) for layers.0.q, got 'row_var' of shape"),
        ("lora", "adapter_name: expected an AdaLoRA adapter, got 'default', a LORA"),
        ("unknown", "adapter_name: no adapter called 'other'"),
    ],
)
def test_refusals_change_nothing(prepare, message):
    name, optimizer = "default", None
    if prepare == "factored":
        model, optimizer = trained(torch.optim.Adafactor)
    elif prepare == "lora":
        model = peftk.attach(Net(), peftk.LoraConfig(target_modules=["q"]))
    else:
        model, name = peftk.attach(Net(), config()), "other" if prepare == "unknown" else "default"
    if prepare == "early":
        weight_grads(fill(model), "net")
        peftk.update_and_allocate(model, 1)
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        peftk.compact(model, optimizer, name)
    after = state_of(model)
    assert before[0] == after[0] and all(torch.equal(value, after[1][key]) for key, value in before[1].items())


def test_a_step_costs_less():
    """Rank 64 of which 4 are left beside a small layer: the products of the branch are most of the step."""
    torch.manual_seed(0)
    model = peftk.attach(Net(256), config(init_r=256, target_r=4, tfinal=1, total_step=3))
    ids = net_batch()["ids"].repeat(40, 1)

    def seconds() -> float:
        times = []
        for _ in range(9):
            start = time.perf_counter()
            model(ids).sum().backward()
            times.append(time.perf_counter() - start)
        return sorted(times)[1]

    before = seconds()
    fill(model)
    for step in (1, 2):
        weight_grads(model, "net")
        peftk.update_and_allocate(model, step)
    peftk.compact(model)
    assert sum(layer.rank("default") for pair in model.layers for layer in pair.values()) == 16
    assert seconds() < 0.8 * before
