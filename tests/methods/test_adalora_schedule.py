"""The budget in training loops: plain ones, accumulating ones, transformers' Trainer; stopped and resumed."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import Net, batch, fill, llama, net_batch, run
from torch import nn

import peftk
from peftk.checkpoint import adapter_tensors

FIELDS = {"total_step": 12, "tinit": 2, "tfinal": 3, "init_r": 4, "target_r": 2, "target_modules": ["q", "v"]}


def config(**changes) -> peftk.AdaLoraConfig:
    return peftk.AdaLoraConfig(**{**FIELDS, **changes})


def started(seed: int = 0, **changes) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = peftk.attach(Net(), config(**changes))
    return model, torch.optim.AdamW(peftk.trainable_parameters(model), lr=0.05, weight_decay=0.0)


def loss_of(model: nn.Module, step: int, rows: slice = slice(None)) -> torch.Tensor:
    """A sum over rows of the batch."""
    ids = (net_batch()["ids"] + step) % 11
    target = torch.arange(ids.numel()).view(ids.shape) % 5
    logits = model(ids)[rows]
    return nn.functional.cross_entropy(logits.flatten(0, 1), target[rows].flatten(), reduction="sum") / ids.numel()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)  # stays alive into the next step, as in most loops
        loss.backward()
        optimizer.step()


def values(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    return {key: tensor.detach().clone() for key, tensor in adapter_tensors(model, name).items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


def test_the_hook_is_the_loop_by_hand():
    """Steps count from 1; the regulariser's gradient is the loss term's."""
    model, optimizer = started()
    schedule = peftk.adalora_schedule(model, optimizer, compact=False)
    by_hand, other = started()
    for step in range(12):
        train(model, optimizer, range(step, step + 1))
        other.zero_grad()
        (loss_of(by_hand, step) + peftk.orthogonality_loss(by_hand)).backward()
        other.step()
        peftk.update_and_allocate(by_hand, step + 1)
        for key, value in values(model).items():
            torch.testing.assert_close(value, values(by_hand)[key], rtol=1e-3, atol=1e-4, msg=f"{step}: {key}")
    assert schedule.step == 12 and schedule.history == peftk.rank_allocator(by_hand).history
    assert sum(schedule.history[-1][1].values()) == 8 and schedule.history[-1][0] <= 9


def test_the_regulariser_keeps_vectors_apart_without_touching_the_loss():
    distance = {}
    for weight in (0.0, 2.0):
        model, optimizer = started(orth_reg_weight=weight)
        peftk.adalora_schedule(model, optimizer, compact=False)
        train(model, optimizer, range(12))
        A = model.layers[0]["q"].lora_A["default"].detach()
        distance[weight] = (A @ A.T - torch.eye(4)).norm().item()
    assert distance[2.0] < 0.5 * distance[0.0]


def test_a_loss_with_the_regulariser_in_it():
    both, optimizer = started()
    peftk.adalora_schedule(both, optimizer, compact=False, orthogonality=False)
    (loss_of(both, 0) + peftk.orthogonality_loss(both)).backward()
    optimizer.step()
    hooked, optimizer = started()
    peftk.adalora_schedule(hooked, optimizer, compact=False)
    train(hooked, optimizer, range(1))
    for key, value in values(both).items():
        torch.testing.assert_close(value, values(hooked)[key])


def test_accumulated_gradients_count_as_one_step():
    whole, optimizer = started(orth_reg_weight=0.0)
    schedule = peftk.adalora_schedule(whole, optimizer)
    train(whole, optimizer, range(5))
    parts, optimizer = started(orth_reg_weight=0.0)
    accumulated = peftk.adalora_schedule(parts, optimizer)
    for step in range(5):
        optimizer.zero_grad()
        for row in range(3):
            loss_of(parts, step, slice(row, row + 1)).backward()
        optimizer.step()
    assert schedule.step == accumulated.step == 5 and schedule.history == accumulated.history
    scores = schedule.allocator.scores()
    for path, score in accumulated.allocator.scores().items():
        torch.testing.assert_close(score, scores[path], rtol=0.02, atol=1e-9)


def test_pruned_rows_are_gone_by_themselves():
    model, optimizer = started()
    parameters = peftk.trainable_parameters(model)
    peftk.adalora_schedule(model, optimizer)
    train(model, optimizer, range(8))
    before = sum(p.numel() for p in parameters)
    train(model, optimizer, range(8, 9))
    assert sum(layer.rank("default") for layer in (*model.layers[0].values(), *model.layers[1].values())) == 8
    after = sum(p.numel() for p in parameters)
    assert after < 0.6 * before and after == peftk.report(model).trainable.elements
    assert all(s.shape == p.shape for p in parameters for k, s in optimizer.state[p].items() if k != "step")
    y = run(model, "net")
    train(model, optimizer, range(9, 12))
    assert not torch.equal(run(model, "net"), y)  # what is left is trained on
    assert [id(p) for p in peftk.trainable_parameters(model)] == [id(p) for p in parameters]


@pytest.mark.parametrize("stop", [1, 5, 9, 11])
def test_a_stopped_run_goes_on_exactly(stop, tmp_path):
    """Before the first pruning, between two, right after the last, in the final phase."""
    whole, optimizer = started()
    schedule = peftk.adalora_schedule(whole, optimizer)
    train(whole, optimizer, range(12))

    torn, optimizer = started()
    first = peftk.adalora_schedule(torn, optimizer)
    train(torn, optimizer, range(stop))
    peftk.save_adapter(torn, tmp_path / "adapter")
    torch.save({"optimizer": optimizer.state_dict(), "ranks": first.state_dict()}, tmp_path / "state.pt")

    torch.manual_seed(0)
    again = peftk.load_adapter(Net(), tmp_path / "adapter", is_trainable=True)
    optimizer = torch.optim.AdamW(peftk.trainable_parameters(again), lr=0.05, weight_decay=0.0)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    second = peftk.adalora_schedule(again, optimizer)
    second.load_state_dict(state["ranks"])
    train(again, optimizer, range(stop, 12))
    assert_equal(values(whole), values(again))
    assert second.history == schedule.history and second.step == 12


def test_a_resumed_optimizer_state_belongs_to_the_rows_left(tmp_path):
    model, optimizer = started()
    schedule = peftk.adalora_schedule(model, optimizer)
    train(model, optimizer, range(10))
    fresh, _ = started()
    with pytest.raises(ValueError, match="state: expected that of the adapter's own matrices"):
        peftk.rank_allocator(fresh).load_state_dict(schedule.state_dict())


def test_several_adapters_have_budgets_of_their_own():
    model, _ = started()
    peftk.attach(model, config(init_r=3, target_r=1, total_step=8, tfinal=1), "default2")
    peftk.set_adapter(model, ["default", "default2"])
    optimizer = torch.optim.AdamW(peftk.trainable_parameters(model), lr=0.05)
    one = peftk.adalora_schedule(model, optimizer)
    two = peftk.adalora_schedule(model, optimizer, adapter_name="default2")
    train(model, optimizer, range(12))
    assert sum(one.allocator.ranks().values()) == 8 and sum(two.allocator.ranks().values()) == 4
    alone = copy.deepcopy(values(model))
    peftk.set_adapter(model, "default2")
    train(model, optimizer, range(2))
    assert one.step == 12 and two.step == 14  # steps in which an adapter isn't trained don't count
    assert_equal(alone, values(model))


def test_a_deleted_adapters_ranks_are_forgotten():
    model, optimizer = started()
    schedule = peftk.adalora_schedule(model, optimizer)
    train(model, optimizer, range(5))
    peftk.attach(model, config(), "other")
    peftk.delete_adapter(model, "default")
    peftk.attach(model, config())
    assert peftk.rank_allocator(model).step == 0
    optimizer.add_param_group({"params": peftk.trainable_parameters(model)})
    train(model, optimizer, range(12))
    assert schedule.step == 5  # the hook that was left on the optimizer belonged to the other
    peftk.detach(model)
    optimizer.step()


def test_remove_leaves_the_optimizer_alone():
    model, optimizer = started()
    schedule = peftk.adalora_schedule(model, optimizer)
    train(model, optimizer, range(2))
    schedule.remove()
    train(model, optimizer, range(2))
    assert schedule.step == 2


def test_a_copy_of_the_model_has_an_allocator_of_its_own():
    model, optimizer = started()
    peftk.adalora_schedule(model, optimizer)
    train(model, optimizer, range(5))
    twin = copy.deepcopy(model)
    train(model, optimizer, range(5, 7))
    assert peftk.rank_allocator(twin).step == 5 and peftk.rank_allocator(model).step == 7
    assert peftk.rank_allocator(twin).config is not peftk.rank_allocator(model).config


def test_total_step_may_be_given_late():
    model, optimizer = started()
    schedule = peftk.adalora_schedule(model, optimizer, total_step=40)
    assert schedule.allocator.final_step == 37
    with pytest.raises(ValueError, match=r"tinit: expected an integer from 0 to below total_step - tfinal \(1\)"):
        peftk.adalora_schedule(model, optimizer, total_step=4)
    assert schedule.allocator.final_step == 37


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_gradient_scaler(fused):
    """Before a fused optimizer the scaler leaves gradients as they are, and says nothing of infinities."""
    results = []
    for scale in (1.0, 1024.0):
        model, _ = started()
        optimizer = torch.optim.SGD(peftk.trainable_parameters(model), lr=0.05, fused=fused)
        schedule = peftk.adalora_schedule(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append((values(model), schedule.allocator.scores()))
    for one, other in zip(*results, strict=True):
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], rtol=1e-2, atol=1e-4 * value.abs().max().item())
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 4)).backward()
    model.layers[0]["q"].lora_A["default"].grad[0, 0] = float("inf")
    scaler.step(optimizer)
    assert schedule.step == 3 and all(score.isfinite().all() for score in schedule.allocator.scores().values())


class Careful(torch.optim.SGD):
    """Leaves out a step with gradients that aren't finite, as peftk.optim's may."""

    skipped_steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        if not all(p.grad.isfinite().all() for p in self.param_groups[0]["params"] if p.grad is not None):
            self.skipped_steps += 1
            return
        super().step()


def test_a_step_within_a_step_is_one():
    """torch calls the hooks of a class's step and of its parent's, once an optimizer of the parent's class was made."""
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    plain, nested = [], []
    for optimizer_class, result in ((torch.optim.SGD, plain), (Careful, nested)):
        model, _ = started()
        optimizer = optimizer_class(peftk.trainable_parameters(model), lr=0.05)
        schedule = peftk.adalora_schedule(model, optimizer)
        train(model, optimizer, range(3))
        result += [schedule.step, values(model)]
    assert plain[0] == nested[0] == 3
    assert_equal(plain[1], nested[1])


def test_a_step_that_failed_does_not_stop_the_rest():
    model, _ = started()
    optimizer = Careful(peftk.trainable_parameters(model), lr=0.05)
    schedule = peftk.adalora_schedule(model, optimizer)
    train(model, optimizer, range(2))
    optimizer.param_groups[0]["params"].append(None)
    with pytest.raises(AttributeError):
        optimizer.step()
    optimizer.param_groups[0]["params"].pop()
    train(model, optimizer, range(2, 4))
    assert schedule.step == 4


def test_a_step_that_the_optimizer_leaves_out_does_not_count():
    model, _ = started()
    optimizer = Careful(peftk.trainable_parameters(model), lr=0.05)
    schedule = peftk.adalora_schedule(model, optimizer)
    train(model, optimizer, range(2))
    model.layers[0]["q"].lora_A["default"].grad[0, 0] = float("inf")
    optimizer.step()
    assert schedule.step == 2 and all(score.isfinite().all() for score in schedule.allocator.scores().values())
    train(model, optimizer, range(2, 12))
    assert schedule.step == 12 and schedule.allocator.is_final


def test_bad_arguments():
    model, optimizer = started()
    with pytest.raises(ValueError, match="adapter_name: no adapter called 'other'; attached are default"):
        peftk.adalora_schedule(model, optimizer, adapter_name="other")
    with pytest.raises(ValueError, match=r"optimizer: expected the parameters of 'default' in it, got one without layers.0.q's"):
        peftk.adalora_schedule(model, torch.optim.SGD(model.head.parameters(), lr=0.1))
    peftk.attach(model, peftk.LoraConfig(target_modules=["head"]), "lora")
    with pytest.raises(ValueError, match="adapter_name: expected an AdaLoRA adapter, got 'lora', a LORA"):
        peftk.update_and_allocate(model, 1, "lora")
    with pytest.raises(ValueError, match="expected gradients of the adapter's parameters, got none"):
        peftk.update_and_allocate(model, 1)


def test_closures_need_the_loss_term():
    model, optimizer = started()
    schedule = peftk.adalora_schedule(model, optimizer)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="expected no closure.*add peftk.orthogonality_loss"):
        optimizer.step(closure)
    schedule.remove()
    schedule = peftk.adalora_schedule(model, optimizer, orthogonality=False)
    optimizer.step(closure)
    assert schedule.step == 1


def test_an_optimizer_with_states_of_other_shapes_trains_on(caplog):
    model, _ = started()
    optimizer = torch.optim.Adafactor(peftk.trainable_parameters(model))
    schedule = peftk.adalora_schedule(model, optimizer)
    train(model, optimizer, range(12))
    assert "pruned triplets stay, with value 0: optimizer: expected states of the parameter's shape" in caplog.text
    ranks = schedule.allocator.ranks()
    assert {path: int((model.get_submodule(path).lora_E["default"] != 0).sum()) for path in ranks} == ranks
    assert sum(ranks.values()) == 8 and model.layers[0]["q"].rank("default") == 4


@pytest.mark.parametrize("way", ["optimizer given", "callback"])
def test_in_transformers_trainer(way, tmp_path):
    """The Trainer's own optimizer, wrapped by accelerate, is at hand when training begins."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = llama()
    peftk.attach(model, config(target_modules=["q_proj", "v_proj", "down_proj"], total_step=12))
    schedules = []

    class Callback(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            schedules.append(peftk.adalora_schedule(model, optimizer, total_step=state.max_steps))

    more = {"callbacks": [Callback()]}
    if way == "optimizer given":
        optimizer = torch.optim.AdamW(peftk.trainable_parameters(model), lr=0.05)
        schedules.append(peftk.adalora_schedule(model, optimizer))
        more = {"optimizers": (optimizer, None)}
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path,
        max_steps=12,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    ids = batch("llama")["input_ids"]
    data = [{"input_ids": row, "labels": row} for _ in range(10) for row in ids]
    transformers.Trainer(model, arguments, train_dataset=data, **more).train()
    (schedule,) = schedules
    assert schedule.step == 12 and schedule.allocator.is_final
    assert sum(schedule.allocator.ranks().values()) == 12
    assert sum(p.shape[0] for key, p in adapter_tensors(model, "default").items() if key.endswith("lora_E")) == 12


def test_another_base_in_four_bits():
    torch.manual_seed(0)
    model = peftk.quantize_model(Net(), progress=False)
    fill(peftk.attach(model, config()))
    optimizer = torch.optim.AdamW(peftk.trainable_parameters(model), lr=0.05)
    peftk.adalora_schedule(model, optimizer)
    train(model, optimizer, range(12))
    y = run(model, "net")
    peftk.merge(model)
    torch.testing.assert_close(run(model, "net"), y, rtol=0.3, atol=0.3)
    peftk.unmerge(model)
    assert torch.equal(run(model, "net"), y)


def _train_in_a_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model, _ = started()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(peftk.trainable_parameters(model), lr=0.05, weight_decay=0.0)
    schedule = peftk.adalora_schedule(model, optimizer)
    for step in range(12):
        optimizer.zero_grad()
        loss_of(ddp, step + 100 * rank).backward()  # other data in each
        optimizer.step()
    torch.save({"ranks": schedule.allocator.ranks(), "values": values(model)}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.full
def test_processes_with_data_of_their_own_keep_the_same_triplets(tmp_path):
    torch.multiprocessing.spawn(_train_in_a_process, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["ranks"] == other["ranks"] and sum(one["ranks"].values()) == 8
    assert_equal(one["values"], other["values"])
    assert one["values"]["base_model.model.layers.0.q.lora_A"].shape == (4, 32)  # DDP's buckets know the shapes


def test_among_processes_rows_stay(monkeypatch, caplog):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model, optimizer = started()
    schedule = peftk.adalora_schedule(model, optimizer)
    train(model, optimizer, range(12))
    assert "pruned triplets stay, with value 0: gradients are shared among processes" in caplog.text
    assert sum(schedule.allocator.ranks().values()) == 8 and model.layers[0]["q"].rank("default") == 4
    peftk.compact(model, optimizer)
    assert sum(len(t) for key, t in values(model).items() if key.endswith("lora_E")) == 8
