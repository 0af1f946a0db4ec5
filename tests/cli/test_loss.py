from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional

from peftk.cli.loss import IGNORED, LanguageModelLoss, count_targets, head_cross_entropy


@pytest.mark.parametrize("rows", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradient_are_those_of_torch(rows, bias):
    hidden = torch.randn(23, 16, dtype=torch.float64)
    weight, b = torch.randn(50, 16, dtype=torch.float64), torch.randn(50, dtype=torch.float64) if bias else None
    targets = torch.randint(0, 50, (23,))
    targets[::4] = IGNORED
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = head_cross_entropy(ours, weight, b, targets, rows)
    expected = functional.cross_entropy(functional.linear(theirs, weight, b), targets, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (loss * 0.37).backward()
    (expected * 0.37).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_bf16_is_as_close_as_torch():
    hidden = torch.randn(40, 64).bfloat16()
    weight = torch.randn(300, 64).bfloat16() / 8
    targets = torch.randint(0, 300, (40,))
    ours, theirs, truth = (hidden.clone().to(d).requires_grad_() for d in (torch.bfloat16, torch.bfloat16, torch.float64))
    head_cross_entropy(ours, weight, None, targets, 7).backward()
    functional.cross_entropy(functional.linear(theirs, weight).float(), targets, reduction="sum").backward()
    functional.cross_entropy(functional.linear(truth, weight.double()), targets, reduction="sum").backward()
    error = (ours.grad.double() - truth.grad).norm()
    assert error <= 2 * (theirs.grad.double() - truth.grad).norm()


def test_no_targets_give_zero_and_a_zero_gradient():
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = head_cross_entropy(hidden, torch.randn(10, 8), None, torch.full((4,), IGNORED))
    loss.backward()
    assert loss.item() == 0 and torch.equal(hidden.grad, torch.zeros(4, 8))


def test_logits_are_never_whole():
    """No tensor of the loss is larger than a chunk or the head."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    hidden = torch.randn(512, 8, requires_grad=True)
    with Watch():
        head_cross_entropy(hidden, torch.randn(1000, 8), None, torch.randint(0, 1000, (512,)), rows=16).backward()
    assert largest == 16 * 1000


def test_a_trained_head_is_refused():
    with pytest.raises(ValueError, match="frozen head"):
        head_cross_entropy(torch.randn(2, 8), torch.randn(10, 8, requires_grad=True), None, torch.tensor([1, 2]))


def batch():
    ids = torch.randint(0, 256, (3, 20))
    labels = ids.clone()
    labels[0, :9] = IGNORED
    return ids, labels


def test_model_loss_is_the_models_own(model):
    model.requires_grad_(False)
    ids, labels = batch()
    loss = LanguageModelLoss(model)
    assert loss.why_whole == ""
    expected = model(input_ids=ids, labels=labels).loss * count_targets(labels)
    torch.testing.assert_close(loss(ids, labels), expected, rtol=1e-5, atol=0)


def test_gradients_reach_what_is_trained(model):
    model.requires_grad_(False)
    trained = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    ids, labels = batch()
    LanguageModelLoss(model)(ids, labels).backward()
    ours, trained.grad = trained.grad, None
    (model(input_ids=ids, labels=labels).loss * count_targets(labels)).backward()
    torch.testing.assert_close(ours, trained.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["trained head", "scaled logits", "no head"])
def test_other_models_fall_back_with_a_reason(model, case, caplog):
    model.requires_grad_(False)
    if case == "trained head":
        model.lm_head.weight.requires_grad_()
    elif case == "scaled logits":
        inner = model.forward
        model.forward = lambda **kwargs: scaled(inner(**kwargs), kwargs.get("labels"))
    else:
        model.get_output_embeddings = lambda: None
    ids, labels = batch()
    with caplog.at_level(logging.WARNING, "peftk.cli"):
        loss = LanguageModelLoss(model)
    assert loss.why_whole and loss.why_whole in caplog.text
    expected = model(input_ids=ids, labels=labels).loss * count_targets(labels)
    torch.testing.assert_close(loss(ids, labels), expected)


def scaled(out, labels):
    out.logits = out.logits * 0.5
    if labels is not None:
        out.loss = functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    return out


def test_the_probe_leaves_the_training_mode(model):
    model.requires_grad_(False).train()
    LanguageModelLoss(model)
    assert model.training and isinstance(model.get_output_embeddings(), nn.Linear)
