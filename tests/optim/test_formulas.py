"""Lion and AdEMAMix: what the frame makes of their formulas. bitsandbytes' steps and state dicts, paging, schedules, refusals."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from optim.test_layouts import assert_go_on_alike, train
from torch import nn

from peftk import optim
from peftk.optim import AdamW, AdEMAMix, AdEMAMix8bit, Lion, Lion8bit, PagedAdEMAMix8bit, PagedLion, to_bitsandbytes, to_torch
from peftk.optim.ademamix import scheduled_alpha, scheduled_beta3
from peftk.optim.moments import bits_of, names

SHAPES = [(70, 90), (33,)]  # one large enough for 8 bits, one not; the last block of the first is short
OPTIONS = {"Lion": dict(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1), "AdEMAMix": dict(lr=1e-3, alpha=3.0, weight_decay=0.1)}
KINDS = ["Lion", "Lion8bit", "AdEMAMix", "AdEMAMix8bit"]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def made(kind: str, of=optim, **options) -> torch.optim.Optimizer:
    base = kind.removesuffix("8bit").removeprefix("Paged")
    return getattr(of, kind)(parameters(), **OPTIONS[base] | options)


def params_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return optimizer.param_groups[0]["params"]


def continued(first: torch.optim.Optimizer, second: torch.optim.Optimizer, change=lambda state: state) -> None:
    """Give the second one the first one's parameters and state."""
    for p, q in zip(params_of(second), params_of(first), strict=True):
        p.data.copy_(q.data)
    second.load_state_dict(change(copy.deepcopy(first.state_dict())))


@pytest.mark.parametrize("kind", ["Lion", "AdEMAMix"])
def test_steps_are_bitsandbytes(kind):
    theirs, ours = made(kind, pytest.importorskip("bitsandbytes.optim")), made(kind)
    assert_go_on_alike(theirs, ours, 1e-5, 1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_from_bitsandbytes(kind):
    theirs, ours = made(kind, pytest.importorskip("bitsandbytes.optim")), made(kind)
    train(theirs, 0, 3)
    continued(theirs, ours)
    state, other = ours.state[params_of(ours)[0]], theirs.state[params_of(theirs)[0]]
    bits = 8 if kind.endswith("8bit") else 32
    assert bits_of(state) == bits and state["step"] == 3
    first, *rest = names(ours.FORMULA.moments, bits)
    for name, value in ((first, other["state1"][0] if "AdEMAMix" in kind else other["state1"]), ("step", 3)):
        assert torch.equal(torch.as_tensor(state[name]), torch.as_tensor(value)), name
    if "AdEMAMix" in kind:
        assert torch.equal(state[rest[1]], other["state1"][1]) and torch.equal(state[rest[0]], other["state2"])
    # In 8 bits its CPU quantiser looks codes up by an approximation: after a step the states part by a code here and there.
    train(theirs, 3, 4), train(ours, 3, 4)
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_to_bitsandbytes(kind):
    ours, theirs = made(kind), made(kind, pytest.importorskip("bitsandbytes.optim"))
    train(ours, 0, 3)
    continued(ours, theirs, to_bitsandbytes)
    back = made(kind)
    continued(theirs, back)
    for p, q in zip(params_of(ours), params_of(back), strict=True):
        for name, value in ours.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(back.state[q][name])), name
    train(ours, 3, 4), train(theirs, 3, 4)
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_paged_and_saved_it_goes_on_bit_for_bit(kind, tmp_path):
    """Six steps unpaged, and three and three paged with room for half of the moments, by a pickle and a state dict between."""
    whole, first = made(kind), made(f"Paged{kind}", budget=32_000, folder=tmp_path)
    train(whole, 0, 6), train(first, 0, 3)
    copied = pickle.loads(pickle.dumps(first))
    second = made(f"Paged{kind}", budget=32_000, folder=tmp_path)
    continued(copied, second)
    train(second, 3, 6)
    (pager,) = second._pages._pagers.values()
    for p, q in zip(params_of(second), params_of(whole), strict=True):
        assert torch.equal(p, q)
        bits = bits_of(second.state[p])
        assert bits == bits_of(whole.state[q]) and all(
            second.state[p][name] in pager for name in names(second.FORMULA.moments, bits)
        )
    assert pager.stats().resident <= 32_000


def test_bytes_of_state():
    for kind, nbytes in ((Lion, 4), (Lion8bit, 1.02), (AdEMAMix, 12), (AdEMAMix8bit, 3.05)):
        optimizer = kind([nn.Parameter(torch.ones(25600))])
        train(optimizer, 0, 1)
        state = optimizer.state[params_of(optimizer)[0]]
        found = sum(state[name].nbytes for name in names(optimizer.FORMULA.moments, bits_of(state)))
        assert found / 25600 == pytest.approx(nbytes, abs=0.005)


def test_overrides_and_cuts():
    """A slow average moves with its parameter, in 8 bits too."""
    optimizer = made("AdEMAMix8bit")
    train(optimizer, 0, 2)
    large, small = params_of(optimizer)
    optimizer.override(small, bits=8)
    optimizer.override(large, bits=32)
    assert [bits_of(optimizer.state[p]) for p in (large, small)] == [32, 8] and "state3" in optimizer.state[small]
    slow = optimizer.state[large]["exp_avg_slow"].clone()
    index = torch.tensor([0, 5, 69])
    large.data = large.data[index]
    optimizer.cut_state(large, 0, index)
    assert torch.equal(optimizer.state[large]["exp_avg_slow"], slow[index])
    train(optimizer, 2, 3)


def test_schedules():
    assert [scheduled_alpha(step, 5.0, 4) for step in (1, 4, 9)] == [1.25, 5.0, 5.0] and scheduled_alpha(1, 5.0, None) == 5.0
    half_lives = [-math.log(2) / math.log(scheduled_beta3(step, 0.9, 0.9999, 100)) for step in (0, 50, 100, 200)]
    first, last = -math.log(2) / math.log(0.9), -math.log(2) / math.log(0.9999)
    assert half_lives == pytest.approx([first, (first + last) / 2, last, last], rel=1e-6)
    assert scheduled_beta3(1, 0.9, 0.9999, None) == 0.9999 and 0 < scheduled_beta3(50, 0.0, 0.9999, 100) < 0.9999


def test_scheduled_steps_are_bitsandbytes():
    options = dict(t_alpha=4, t_beta3=4)
    theirs, ours = made("AdEMAMix", pytest.importorskip("bitsandbytes.optim"), **options), made("AdEMAMix", **options)
    train(theirs, 0, 3), train(ours, 0, 3)
    assert_go_on_alike(theirs, ours, 1e-5, 1e-6)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"betas: expected three numbers, got \(0.9, 0.999\)"):
        AdEMAMix(parameters(), betas=(0.9, 0.999))
    with pytest.raises(ValueError, match=r"betas: expected two numbers, got \(0.9, 0.99, 0.999\)"):
        Lion(parameters(), betas=(0.9, 0.99, 0.999))
    with pytest.raises(ValueError, match="alpha: expected a finite number, 0 or more, got -1"):
        AdEMAMix(parameters(), alpha=-1)
    lion, adamw = Lion(parameters()), AdamW(parameters())
    train(lion, 0, 1), train(adamw, 0, 1)
    with pytest.raises(
        ValueError, match=r"state\[0\]: expected exp_avg and exp_avg_sq or state1 and state2 and .*, got step, exp_avg$"
    ):
        AdamW(parameters()).load_state_dict(lion.state_dict())
    with pytest.raises(ValueError, match=r"state\[0\]: expected exp_avg or state1 and absmax1, got step, exp_avg, exp_avg_sq$"):
        Lion(parameters()).load_state_dict(adamw.state_dict())
    with pytest.raises(ValueError, match="state_dict: expected AdamW's, got one with exp_avg$"):
        to_torch(lion.state_dict())


def test_names_users_know():
    for name in ("Lion", "AdEMAMix", "AdamW"):
        for paged in ("", "Paged"):
            for bits in ("", "8bit"):
                optimizer = getattr(optim, f"{paged}{name}{bits}")(parameters())
                assert optimizer.options.paged == bool(paged) and optimizer.param_groups[0]["bits"] == (8 if bits else 32)
    assert issubclass(PagedLion, Lion) and issubclass(PagedAdEMAMix8bit, AdEMAMix8bit) and "budget" in Lion.__doc__
