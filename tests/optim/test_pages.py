"""Paged moments: the same bits as unpaged, within the budget, by slices; what a checkpoint and a copy keep."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from peftk.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit, PagedAdEMAMix8bit
from peftk.optim.pages import Pages, _pieces
from peftk.optim.stepping import Call, Contiguous

SHAPES = [(300, 700), (33,), (256, 256), (64, 65), (50_003,)]
KINDS = [(AdamW, PagedAdamW), (AdamW8bit, PagedAdamW8bit)]


@pytest.fixture
def folder(tmp_path_factory, tmp_path):
    """On a disk, where the tests' own folder is: pagers refuse memory."""
    return tmp_path


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(t.nbytes for s in optimizer.state.values() for n, t in s.items() if n[:4] != "qmap" and hasattr(t, "nbytes"))


@pytest.mark.parametrize(("plain", "paged"), KINDS)
@pytest.mark.parametrize("share", [None, 0.5, 0.2], ids=str)
def test_same_bits_as_unpaged(plain, paged, share, folder):
    """Twenty steps; half of the state or a fifth may be resident."""
    ours, theirs = parameters(), parameters()
    other = plain(theirs, lr=1e-2)
    train(other, 0, 1)
    budget = None if share is None else int(share * state_bytes(other))
    optimizer = paged(ours, lr=1e-2, budget=budget, folder=folder)
    train(other, 1, 20)
    train(optimizer, 0, 20)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
    (pager,) = optimizer._pages._pagers.values()
    for p in ours:
        assert all(t in pager for n, t in optimizer.state[p].items() if n not in ("step", "qmap1", "qmap2"))
    stats = pager.stats()
    if share:
        assert stats.resident <= budget and stats.paged_out > 0 and stats.bytes_in > 0
        assert stats.hit_rate > 0.5


@pytest.mark.parametrize(("plain", "paged"), KINDS)
@pytest.mark.parametrize("by", ["state_dict", "deepcopy", "pickle"])
def test_copies_are_paged_again(plain, paged, by, folder):
    whole, parts = parameters(), parameters()
    train(plain(whole, lr=1e-2), 0, 4)
    first = paged(parts, lr=1e-2, budget=400_000, folder=folder)
    train(first, 0, 2)
    if by == "state_dict":
        second = paged(parts, lr=1e-2, budget=400_000, folder=folder)
        second.load_state_dict(first.state_dict())
    else:
        parts, second = copy.deepcopy((parts, first)) if by == "deepcopy" else pickle.loads(pickle.dumps((parts, first)))
    (one,), (two,) = first._pages._pagers.values(), second._pages._pagers.values()
    tensors = [t for s in second.state.values() for n, t in s.items() if n not in ("step", "qmap1", "qmap2")]
    assert one is not two and all(t in two and t not in one for t in tensors)
    train(second, 2, 4)
    for p, q in zip(parts, whole, strict=True):
        assert torch.equal(p, q)


def test_unpaged_state_loads_paged_and_back(folder):
    plain = AdamW8bit(parameters())
    train(plain, 0, 1)
    paged, back = PagedAdamW8bit(parameters(), folder=folder), AdamW8bit(parameters())
    paged.load_state_dict(plain.state_dict())
    back.load_state_dict(paged.state_dict())
    for state, other in zip(plain.state.values(), back.state.values(), strict=True):
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("limit", [5000, 100_000, 10**9])
def test_pieces_cover_everything_once(bits, limit):
    """In order, between blocks, none above the limit but for a single block."""
    optimizer = AdamW(parameters(), bits=bits, min_8bit_size=0)
    train(optimizer, 0, 1)
    params = list(optimizer.state)
    call = Call(AdamW.FORMULA, bits, 2, params, [p.grad for p in params], [optimizer.state[p] for p in params])
    with Contiguous(call) as tensors:
        pieces = list(_pieces(call, (), tensors, limit))
    for position, lists in enumerate(zip(*[[p.params, p.grads, *p.moments] for p in pieces], strict=True)):
        whole = (params, call.grads, *call.moments())[position]
        joined = torch.cat([t for tensors in lists for t in tensors])
        assert torch.equal(joined, torch.cat([t.reshape(-1) for t in whole]))
    assert all(sum(t.nbytes for t in p.resident()) <= max(limit, 2048) for p in pieces)
    assert len(pieces) == 1 or limit < 10**9


def test_a_budget_for_less_than_a_block(folder):
    params = [nn.Parameter(torch.ones(5000))]
    optimizer = PagedAdEMAMix8bit(params, budget=2 * 4096, folder=folder)
    with pytest.raises(
        ValueError, match=r"budget: expected room for 256 elements' moments, .* each of 6 tensors, got 8192 bytes"
    ):
        train(optimizer, 0, 1)
    assert (params[0] == 1).all()


def test_no_folder(tmp_path):
    with pytest.raises(OSError, match="absent"):
        PagedAdamW([nn.Parameter(torch.ones(5000))], folder=tmp_path / "absent")


def test_a_pager_a_device():
    pages = Pages(None, None)
    for value in (0, 127):
        assert pages.full((3,), value, torch.uint8, torch.device("cpu")).tolist() == [value] * 3
    assert len(pages._pagers) == 1


@pytest.mark.parametrize("kind", [PagedAdamW8bit, PagedAdEMAMix8bit])
def test_what_takes_its_step_together_may_lie_apart(kind, folder):
    """Small parameters, in 32 bits, between large ones in 8: their moments lie on more chunks than the budget has."""
    shapes = [(200, 256), (64,)] * 24
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    optimizer, plain = kind(ours, budget=128 << 10, folder=folder), kind(theirs, paged=False)
    train(optimizer, 0, 3), train(plain, 0, 3)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
    (pager,) = optimizer._pages._pagers.values()
    assert pager.stats().resident <= 128 << 10
