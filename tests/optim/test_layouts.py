"""State dicts to and from torch's and bitsandbytes' AdamW: the bytes, and the steps that follow."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peftk.format.dynamic8 import values8
from peftk.optim import AdamW, AdamW8bit, to_bitsandbytes, to_torch
from peftk.optim.moments import AVERAGE, SQUARE, bits_of, names

SHAPES = [(70, 90), (33,)]  # one large enough for 8 bits, one not
OPTIONS = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def handed_over(first, second, ours_to_theirs=lambda state: state) -> tuple[list, list]:
    """Parameters after three steps of ``first``, whose state ``second`` then has, on copies of them."""
    before, after = parameters(), parameters()
    one = first(before, **OPTIONS)
    train(one, 0, 3)
    for p, q in zip(after, before, strict=True):
        p.data.copy_(q.data)
    two = second(after, **OPTIONS)
    two.load_state_dict(ours_to_theirs(copy.deepcopy(one.state_dict())))
    return one, two


def assert_go_on_alike(one, two, rtol: float, atol: float) -> None:
    train(one, 3, 5)
    train(two, 3, 5)
    for p, q in zip(one.param_groups[0]["params"], two.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)


def test_from_torch():
    theirs, ours = handed_over(torch.optim.AdamW, AdamW)
    for p, q in zip(theirs.param_groups[0]["params"], ours.param_groups[0]["params"], strict=True):
        assert torch.equal(theirs.state[p]["exp_avg_sq"], ours.state[q]["exp_avg_sq"]) and ours.state[q]["step"] == 3
    assert_go_on_alike(theirs, ours, 1e-6, 1e-8)


def test_to_torch():
    assert_go_on_alike(*handed_over(AdamW, torch.optim.AdamW, to_torch), 1e-6, 1e-8)


def test_8_bits_to_torch_and_back():
    """Codes of v come back as they were. The signed code has 1 and no -1: where a block's largest m is negative, its absmax
    becomes 0.993 of what it was, and codes follow."""
    ours, theirs = handed_over(AdamW8bit, torch.optim.AdamW, to_torch)
    again = AdamW8bit(parameters(), **OPTIONS)
    again.load_state_dict(theirs.state_dict())
    first, second = (optimizer.state[optimizer.param_groups[0]["params"][0]] for optimizer in (ours, again))
    assert bits_of(second) == 8
    assert torch.equal(first["state2"], second["state2"]) and torch.equal(first["absmax2"], second["absmax2"])
    negative = first["absmax1"] != second["absmax1"]
    assert negative.any() and not negative.all()
    torch.testing.assert_close(second["absmax1"][negative], first["absmax1"][negative] * values8()[0].abs(), rtol=1e-6, atol=0)
    kept = (~negative).repeat_interleave(256)[: first["state1"].numel()]
    assert torch.equal(first["state1"].view(-1)[kept], second["state1"].view(-1)[kept])


def test_from_torchs_32_bits_to_8():
    _, ours = handed_over(torch.optim.AdamW, AdamW8bit)
    assert [bits_of(ours.state[p]) for p in ours.param_groups[0]["params"]] == [8, 32]


def test_8_bits_from_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes.optim")
    theirs, ours = handed_over(bnb.AdamW8bit, AdamW8bit)
    p, q = theirs.param_groups[0]["params"][0], ours.param_groups[0]["params"][0]
    for name in (*names((AVERAGE, SQUARE), 8), "qmap1", "qmap2"):
        assert torch.equal(theirs.state[p][name], ours.state[q][name]), name
    assert bits_of(ours.state[ours.param_groups[0]["params"][1]]) == 32
    # Its CPU quantiser looks codes up by an approximation: after a step the states part by a code here and there.
    train(theirs, 3, 4)
    train(ours, 3, 4)
    torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["AdamW", "AdamW8bit"])
def test_to_bitsandbytes(kind):
    bnb = pytest.importorskip("bitsandbytes.optim")
    ours, theirs = handed_over({"AdamW": AdamW, "AdamW8bit": AdamW8bit}[kind], getattr(bnb, kind), to_bitsandbytes)
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        mine, other = ours.state[p], theirs.state[q]
        assert other["step"] == 3 and other["state1"].dtype == (torch.uint8 if bits_of(mine) == 8 else torch.float32)
        assert torch.equal(other["state1"], mine["state1" if bits_of(mine) == 8 else "exp_avg"])
    train(theirs, 3, 4)
    train(ours, 3, 4)
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_named():
    optimizer = AdamW8bit(parameters())
    train(optimizer, 0, 1)

    def changed(**changes) -> dict:
        state = copy.deepcopy(optimizer.state_dict())
        state["state"][0] = {name: v for name, v in (state["state"][0] | changes).items() if v is not None}
        return state

    for state, message in [
        (changed(absmax1=torch.zeros(4)), r"state\[0\].absmax1: expected 25 fp32 values, one for 256 codes, got torch.float32"),
        (changed(absmax2=None), r"state\[0\].absmax2: expected 25 fp32 values, one for 256 codes, got NoneType"),
        (changed(qmap1=values8(False)), r"state\[0\].qmap1: expected the signed dynamic 8-bit values, got torch.float32"),
        (changed(max_exp_avg_sq=torch.zeros(3)), r"state\[0\]: expected AdamW without amsgrad, got max_exp_avg_sq"),
        (
            changed(state1=None),
            r"state\[0\]: expected exp_avg and exp_avg_sq or state1 and state2 and absmax1 and absmax2, got step",
        ),
        (
            {"state": {0: {"momentum_buffer": 1}}, "param_groups": [{"params": [0]}]},
            r"state\[0\]: expected a step, got momentum_buffer",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            AdamW8bit(parameters()).load_state_dict(state)
