from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from peftk.cli.errors import UserError
from peftk.cli.loss import IGNORED, LanguageModelLoss
from peftk.cli.packing import Sequences, batch_order
from peftk.cli.training import Plan, Progress, backward_of_step, evaluate, learning_rate, train

CPU = torch.device("cpu")


def plan(**changes) -> Plan:
    values = dict(
        steps=6,
        batch_size=2,
        grad_accum=3,
        lr=1e-2,
        schedule="constant",
        warmup_steps=0,
        max_grad_norm=0.0,
        weight_decay=0.0,
        seed=5,
        eval_every=0,
        save_every=0,
    )
    return Plan(**{**values, **changes})


def sequences(n: int = 7, length: int = 12) -> Sequences:
    """Rows with very different numbers of labels, so that a mean of means shows."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 250, (n, length), generator=generator)
    labels = ids.clone()
    for i in range(n):
        labels[i, : 1 + (3 * i) % (length - 1)] = IGNORED
    return Sequences(ids, labels)


@pytest.fixture
def frozen_but_one(model):
    """The small Llama with one trained projection."""
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    return model


def run(model: nn.Module, data: Sequences, the_plan: Plan, progress=None, optimizer=None, save=lambda _: None):
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    rows = []
    done = train(LanguageModelLoss(model), optimizer, data, data, the_plan, progress or Progress(), rows.append, save)
    return done, rows


def test_constant_schedule_with_warm_up():
    rates = [learning_rate(i, plan(steps=6, warmup_steps=4, lr=1.0)) for i in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_goes_from_the_peak_towards_zero():
    rates = [learning_rate(i, plan(steps=12, warmup_steps=2, schedule="cosine", lr=1.0)) for i in range(12)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[7] == pytest.approx(0.5)  # half-way through the ten steps after the warm-up
    assert rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[-1] < 0.03


def test_the_gradient_is_the_mean_over_the_whole_step(frozen_but_one):
    """Not the mean of the micro-batches' means."""
    data, the_plan = sequences(), plan()
    weight = frozen_but_one.model.layers[0].self_attn.q_proj.weight
    mean, tokens = backward_of_step(LanguageModelLoss(frozen_but_one), data, 0, the_plan, CPU)
    ours, weight.grad = weight.grad, None
    picked = batch_order(7, 0, 6, the_plan.seed)
    expected = frozen_but_one(input_ids=data.input_ids[picked], labels=data.labels[picked]).loss
    expected.backward()
    assert tokens == (data.labels[picked][:, 1:] != IGNORED).sum()
    assert mean == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(ours, weight.grad, rtol=1e-3, atol=1e-6)


def test_accumulation_equals_one_large_batch(frozen_but_one):
    twin = copy.deepcopy(frozen_but_one)
    _, small = run(frozen_but_one, sequences(), plan(batch_size=1, grad_accum=6))
    _, large = run(twin, sequences(), plan(batch_size=6, grad_accum=1))
    assert [row.loss for row in small[1:]] == pytest.approx([row.loss for row in large[1:]], rel=1e-4)


def test_clipping_changes_the_step_and_not_the_reported_norm(frozen_but_one):
    start = frozen_but_one.model.layers[0].self_attn.q_proj.weight.detach().clone()
    norms, moved = [], []
    for limit in (0.0, 1e-3):
        twin = copy.deepcopy(frozen_but_one)
        weight = twin.model.layers[0].self_attn.q_proj.weight
        _, rows = run(twin, sequences(), plan(steps=1, max_grad_norm=limit), optimizer=torch.optim.SGD([weight], lr=1.0))
        norms.append(rows[1].grad_norm)
        moved.append((weight - start).norm().item() / 1e-2)  # plan's rate
    assert norms[0] == pytest.approx(norms[1]) and moved[0] == pytest.approx(norms[0], rel=1e-3)
    assert moved[1] == pytest.approx(1e-3, rel=1e-2)


def test_evaluation_is_a_token_mean_without_dropout_and_without_random_numbers(frozen_but_one):
    data = sequences()
    frozen_but_one.train()
    frozen_but_one.model.layers[0].mlp = nn.Sequential(frozen_but_one.model.layers[0].mlp, nn.Dropout(0.5))
    before = torch.get_rng_state()
    ours = evaluate(LanguageModelLoss(frozen_but_one), data, 2, CPU)
    assert torch.equal(before, torch.get_rng_state()) and frozen_but_one.training
    expected = frozen_but_one.eval()(input_ids=data.input_ids, labels=data.labels).loss.item()
    assert ours == pytest.approx(expected, rel=1e-5)


def test_rows_and_the_times_to_measure_and_to_save(frozen_but_one):
    saved = []
    done, rows = run(frozen_but_one, sequences(), plan(steps=7, eval_every=3, save_every=2), save=lambda p: saved.append(p.step))
    assert [row.step for row in rows] == list(range(8)) and rows == done.rows
    assert [row.step for row in rows if row.eval_loss is not None] == [0, 3, 6, 7]
    assert saved == [2, 4, 6]
    assert rows[0].loss is None and rows[-1].tokens == sum(
        int((sequences().labels[batch_order(7, 6 * i, 6, 5)][:, 1:] != IGNORED).sum()) for i in range(7)
    )
    assert rows[-1].eval_loss < rows[0].eval_loss
    assert done.processed == 7 * 6 * 12


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(frozen_but_one):
    weight = frozen_but_one.model.layers[0].self_attn.q_proj.weight
    before = weight.detach().clone()
    frozen_but_one.model.norm.weight.data.fill_(math.inf)
    with pytest.raises(UserError, match="step 1: loss nan.*lower --lr 0.01"):
        run(frozen_but_one, sequences(), plan())
    assert torch.equal(weight, before)


def test_one_step_takes_the_plans_samples(frozen_but_one):
    assert plan().samples_per_step == 6
    _, rows = run(frozen_but_one, sequences(3), plan(steps=2))  # more samples a step than there are sequences
    assert all(math.isfinite(row.loss) for row in rows[1:])
