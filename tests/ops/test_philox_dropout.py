"""philox_dropout against the generator's published test vectors, and its statistics."""

from __future__ import annotations

import pytest
import torch

import peftk
from peftk.ops import philox_dropout
from peftk.ops.philox_dropout.reference import philox


def test_known_answers():
    """Philox4x32-10 of counter 0 under key 0, and of counter 1 under key 2^32 + 2, from an independent computation in Python."""

    def words(counter: int, key: int) -> list[int]:
        c, (k0, k1), mask = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], (key & 0xFFFFFFFF, key >> 32), 0xFFFFFFFF
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ k0, p1 & mask, (p0 >> 32) ^ c[3] ^ k1, p0 & mask]
            k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
        return c

    assert words(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # Salmon et al.'s published vector
    assert philox(8, 0, torch.device("cpu")).tolist() == words(0, 0) + words(1, 0)
    assert philox(8, 2**32 + 2, torch.device("cpu"))[4:].tolist() == words(1, 2**32 + 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 63, 64, 1000, 4097])
def test_mask_is_the_generators(implementation, count, dtype):
    x = torch.randn(count).to(dtype)
    keep = philox(count, 12345, torch.device("cpu")) >= int(0.3 * 2**32)
    expected = torch.where(keep, (x.float() * torch.tensor(1 / 0.7)), torch.zeros(count)).to(dtype)
    assert torch.equal(philox_dropout(x, 0.3, 12345), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_dropped_is_times_zero(implementation, dtype):
    """NaN and Inf become NaN, zeros keep their sign; on an address that no wide access takes, and with no element at all."""
    x = torch.tensor([float("nan"), float("inf"), -0.0, -3.0, 0.0, 2.0, -1e-30]).repeat(37).to(dtype)
    shifted = torch.cat([x[:1], x])[1:]
    assert torch.equal(philox_dropout(x[:0], 0.5, 4), x[:0])
    with peftk.use("reference"):
        expected = philox_dropout(x, 0.5, 4)
    for got in (philox_dropout(x, 0.5, 4), philox_dropout(shifted, 0.5, 4)):
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(nan=1.0), expected.nan_to_num(nan=1.0))
        assert torch.equal(got.signbit() & ~got.isnan(), expected.signbit() & ~expected.isnan())


def test_rate_and_independence_of_seeds(implementation):
    x = torch.ones(200_000)
    first, second = philox_dropout(x, 0.1, 1), philox_dropout(x, 0.1, 2)
    for y in (first, second):
        assert abs((y == 0).float().mean() - 0.1) < 0.004  # 6 sigma
    both = ((first == 0) & (second == 0)).float().mean()
    assert abs(both - 0.01) < 0.0015
    assert torch.equal(first, philox_dropout(x, 0.1, 1))


def test_gradient_uses_the_same_mask(implementation):
    x = torch.randn(300, requires_grad=True)
    y = philox_dropout(x, 0.5, 9)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0) and set(x.grad.unique().tolist()) == {0.0, 2.0}


def test_not_contiguous(implementation):
    x = torch.randn(20, 30)
    assert torch.equal(philox_dropout(x.T, 0.4, 3), philox_dropout(x.T.contiguous(), 0.4, 3))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"p: expected a probability in \[0, 1\), got 1.0"):
        philox_dropout(torch.ones(4), 1.0, 0)
    with pytest.raises(ValueError, match=r"seed: expected an integer in \[0, 2\^63\), got -1"):
        philox_dropout(torch.ones(4), 0.5, -1)


def test_opcheck():
    torch.library.opcheck(torch.ops.peftk.philox_dropout.default, (torch.randn(30, requires_grad=True), 0.25, 7))
