"""The allocator's decisions: against HF peft's where that one is right, and by hand where it isn't."""

from __future__ import annotations

import pytest
import torch
from tiny_models import Net, fill, hf_model
from torch import nn

import peftk
from peftk.methods.adalora_layer import Triplets
from peftk.methods.rank_allocator import RankAllocator


def config(**changes) -> peftk.AdaLoraConfig:
    fields = {"total_step": 20, "tinit": 2, "tfinal": 4, "init_r": 4, "target_r": 2, "target_modules": ["q", "v"]}
    return peftk.AdaLoraConfig(**{**fields, **changes})


def matrices(count: int = 3, r: int = 4, seed: int = 0) -> dict[str, Triplets]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (r, 6), (r, 1), (5, r)
    return {f"m{i}": Triplets(*(nn.Parameter(torch.randn(s, generator=generator)) for s in shapes)) for i in range(count)}


def set_gradients(of: dict[str, Triplets], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for triplets in of.values():
        for p in triplets:
            p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize(
    "fields",
    [
        {"tinit": 2, "tfinal": 4, "deltaT": 1},
        {"tinit": 0, "tfinal": 5, "deltaT": 3},
        {"tinit": 3, "tfinal": 0, "deltaT": 2, "beta1": 0.5, "beta2": 0.7},
        {"tinit": 5, "tfinal": 14, "target_r": 1, "init_r": 7, "deltaT": 5},
    ],
    ids=str,
)
def test_decisions_equal_hf(fields):
    """Step by step: budget, masks, values. Both get the same random gradients and the same random steps of an optimizer."""
    fields = {"total_step": 20, "init_r": 4, "target_r": 2, "target_modules": ["q", "v"], **fields}
    theirs = hf_model(Net(), fields, "AdaLoraConfig")
    ours = fill(peftk.attach(Net(), peftk.AdaLoraConfig(**fields)))
    pairs = []
    for path in ("layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"):
        layer, hf_layer = ours.get_submodule(path), theirs.base_model.model.get_submodule(path)
        pairs += [(getattr(layer, n)["default"], getattr(hf_layer, n)["default"]) for n in ("lora_A", "lora_E", "lora_B")]
    generator = torch.Generator().manual_seed(1)
    allocator = peftk.rank_allocator(ours)
    for step in range(20):
        for p, p_hf in pairs:
            values, p.grad = torch.randn(p.shape, generator=generator), torch.randn(p.shape, generator=generator)
            p_hf.grad = p.grad.clone()
            with torch.no_grad():
                p.copy_(values if step == 0 else p + 0.1 * values)
                p_hf.copy_(p)
        assert allocator.budget(step) == theirs.base_model.rankallocator.budget_schedule(step)[0]
        ranks = peftk.update_and_allocate(ours, step)
        theirs.base_model.update_and_allocate(step)
        for p, p_hf in pairs:
            assert torch.equal(p, p_hf), step
        if (pattern := theirs.peft_config["default"].rank_pattern) is not None:
            assert {f"{path}.lora_E.default": rows.tolist() for path, rows in allocator.kept.items()} == pattern
            assert ranks == {key.removesuffix(".lora_E.default"): sum(flags) for key, flags in pattern.items()}
    last = 20 - fields["tfinal"]
    assert allocator.is_final is (fields["tfinal"] > 0) and allocator.final_step == last


def test_statistics_and_scores_by_hand():
    torch.manual_seed(0)
    of = matrices(1)
    allocator = RankAllocator(config(beta1=0.6, beta2=0.7), of)
    average, uncertainty = {}, {}
    for step in (0, 1, 2):
        set_gradients(of, step)
        allocator.advance(of, step)
        for name, p in of["m0"]._asdict().items():
            sensitivity = (p * p.grad).abs().detach()
            average[name] = 0.6 * average.get(name, 0) + 0.4 * sensitivity
            uncertainty[name] = 0.7 * uncertainty.get(name, 0) + 0.3 * (sensitivity - average[name]).abs()
    s = {name: average[name] * uncertainty[name] for name in average}
    expected = s["E"][:, 0] + s["A"].mean(1) + s["B"].mean(0)
    torch.testing.assert_close(allocator.scores()["m0"], expected)


def test_budget_is_the_cubic_curve():
    allocator = RankAllocator(config(total_step=100, tinit=10, tfinal=20, init_r=12, target_r=4), matrices(3, 12))
    assert [allocator.budget(step) for step in (0, 10, 80, 81, 100, 500)] == [36, 36, 12, 12, 12, 12]
    for step in range(11, 80):
        assert allocator.budget(step) == int(24 * (1 - (step - 10) / 70) ** 3 + 12)
    budgets = [allocator.budget(step) for step in range(101)]
    assert budgets == sorted(budgets, reverse=True)


@pytest.mark.parametrize("delta", [1, 3])
def test_budget_is_kept_to_exactly(delta):
    of = matrices()
    allocator = RankAllocator(config(deltaT=delta), of)
    for step in range(20):
        set_gradients(of, step)
        for m in of.values():  # as an optimizer does, of pruned values too
            m.E.data.add_(0.1)
        allocator.advance(of, step)
        if step > 2 and step % delta == 0:
            assert sum(allocator.ranks().values()) == allocator.budget(step)
    assert allocator.is_final and sum(allocator.ranks().values()) == 6
    assert {path: int((of[path].E != 0).sum()) for path in of} == allocator.ranks()


def hf_with_gradients(**fields) -> nn.Module:
    fields = {"total_step": 20, "init_r": 4, "target_r": 2, "target_modules": ["q", "v"], **fields}
    theirs = hf_model(Net(), fields, "AdaLoraConfig")
    generator = torch.Generator().manual_seed(0)
    for name, p in theirs.named_parameters():
        if ".lora_" in name:
            p.grad = torch.randn(p.shape, generator=generator)
    return theirs


def test_where_hf_is_wrong():
    """Why the tests below have no twin."""
    with pytest.raises(RuntimeError, match="kthvalue"):  # nothing to prune: it asks for the 0th smallest score
        hf_with_gradients(target_r=4).base_model.update_and_allocate(1)
    theirs = hf_with_gradients()
    next(p for name, p in theirs.named_parameters() if "lora_E" in name).grad = None  # a layer that had no part in the loss
    with pytest.raises(TypeError, match="NoneType"):
        theirs.base_model.update_and_allocate(1)
    theirs = hf_with_gradients()
    for name, p in theirs.named_parameters():  # all scores are equal, as they are at the start: every triplet is pruned
        p.grad = torch.zeros_like(p) if ".lora_" in name else None
    theirs.base_model.update_and_allocate(1)
    assert not any(flag for flags in theirs.peft_config["default"].rank_pattern.values() for flag in flags)
    with pytest.raises(AttributeError):  # the last pruning has not been seen
        hf_with_gradients(tfinal=5).base_model.update_and_allocate(16)


def test_target_equal_to_init_prunes_nothing():
    of = matrices()
    before = {path: m.E.clone() for path, m in of.items()}
    allocator = RankAllocator(config(target_r=4), of)
    for step in range(20):
        set_gradients(of, step)
        allocator.advance(of, step)
    assert allocator.is_final and set(allocator.ranks().values()) == {4}
    assert all(torch.equal(of[path].E, before[path]) for path in of)


def test_untrained_triplets_are_pruned_evenly():
    """At the start all values and with them all scores are 0."""
    of = matrices(4)
    for m in of.values():
        m.E.data.zero_()
    set_gradients(of, 0)
    for m in of.values():  # a vector's gradient is its value times something
        m.A.grad.zero_(), m.B.grad.zero_()
    allocator = RankAllocator(config(tinit=0, total_step=14), of)
    allocator.advance(of, 3)
    assert allocator.budget(3) == 10 and sorted(allocator.ranks().values()) == [2, 2, 3, 3]


def test_a_missing_gradient_is_no_sensitivity():
    of = matrices()
    allocator = RankAllocator(config(), of)
    set_gradients(of, 0)
    allocator.advance(of, 0)
    before = allocator.scores()
    set_gradients(of, 1)
    for p in of["m1"]:
        p.grad = None
    allocator.advance(of, 1)
    after = allocator.scores()
    assert after["m1"].isfinite().all() and after["m1"].max() < before["m1"].max()


def test_no_gradients_at_all_and_bad_ones_are_errors():
    of = matrices()
    allocator = RankAllocator(config(), of)
    with pytest.raises(ValueError, match="scores: expected a step before the last pruning, got step 0"):
        allocator.scores()
    with pytest.raises(ValueError, match="expected gradients of the adapter's parameters, got none; call between backward"):
        allocator.advance(of, 0)
    set_gradients(of, 0)
    of["m1"].B.grad[0, 0] = float("nan")
    before = of["m1"].E.clone()
    with pytest.raises(ValueError, match="m1: expected finite gradients, got NaN or Inf"):
        allocator.advance(of, 5)
    assert torch.equal(of["m1"].E, before)


def test_a_pruned_triplet_can_come_back_until_the_last_pruning():
    of = matrices(2, r=2)
    allocator = RankAllocator(config(init_r=2, target_r=1, tinit=0, total_step=30, tfinal=10), of)
    vectors = of["m0"].A.detach().clone(), of["m0"].B.detach().clone()

    def advance(step: int, favourite: str) -> None:
        for path, m in of.items():
            for p in m:
                p.grad = torch.full_like(p, 2.0 if path == favourite else 0.1)
        with torch.no_grad():  # the optimizer moves pruned values as well
            for m in of.values():
                m.E.add_(0.5)
        allocator.advance(of, step)

    for step in range(10, 14):
        advance(step, "m1")
    assert allocator.ranks() == {"m0": 0, "m1": 2} and not of["m0"].E.any()
    assert torch.equal(of["m0"].A, vectors[0]) and torch.equal(of["m0"].B, vectors[1])
    for step in range(14, 20):
        advance(step, "m0")
    assert allocator.ranks() == {"m0": 2, "m1": 0} and of["m0"].E.all()
    for step in range(20, 30):  # 20 is the last pruning
        advance(step, "m1")
    assert allocator.ranks() == {"m0": 2, "m1": 0} and not of["m1"].E.any()


def test_values_grow_between_two_prunings():
    of = matrices()
    allocator = RankAllocator(config(deltaT=4, tinit=0), of)
    set_gradients(of, 0)
    allocator.advance(of, 8)
    pruned = {path: m.E == 0 for path, m in of.items()}
    assert any(rows.any() for rows in pruned.values())
    for m in of.values():
        m.E.data.add_(0.1)
    allocator.advance(of, 9)
    assert all(m.E.all() for m in of.values())


def test_the_last_pruning_comes_also_where_its_step_was_missed():
    of = matrices()
    allocator = RankAllocator(config(), of)
    set_gradients(of, 0)
    allocator.advance(of, 10)
    allocator.advance(of, 18)
    assert allocator.is_final and sum(allocator.ranks().values()) == 6


def test_history_has_every_change():
    of = matrices()
    allocator = RankAllocator(config(), of)
    for step in range(20):
        set_gradients(of, step)
        allocator.advance(of, step)
    assert allocator.history[0] == (0, {"m0": 4, "m1": 4, "m2": 4})
    assert allocator.history[-1][1] == allocator.ranks()
    assert len(allocator.history) > 4
    assert all(before[1] != after[1] for before, after in zip(allocator.history, allocator.history[1:], strict=False))


def test_resuming_from_the_state_is_exact(tmp_path):
    of, torn = matrices(), matrices()
    whole, first = RankAllocator(config(), of), RankAllocator(config(), torn)
    for step in range(8):
        for allocator, here in ((whole, of), (first, torn)):
            set_gradients(here, step)
            allocator.advance(here, step)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = RankAllocator(config(), torn)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(8, 20):
        for allocator, here in ((whole, of), (second, torn)):
            set_gradients(here, step)
            allocator.advance(here, step)
    assert whole.ranks() == second.ranks() and whole.history == second.history and second.is_final
    assert all(torch.equal(of[path].E, torn[path].E) for path in of)


def test_a_state_of_other_matrices_is_refused():
    allocator = RankAllocator(config(), matrices(3))
    state = RankAllocator(config(), matrices(2)).state_dict()
    with pytest.raises(ValueError, match=r"state: .*got another for m2 \(expected 4 triplets, got 0\)"):
        allocator.load_state_dict(state)
