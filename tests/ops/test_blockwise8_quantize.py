"""blockwise8_quantize: exactly the nearest code, checked in fp64 against all 256 values."""

from __future__ import annotations

import pytest
import torch
from numerics import row_scaled

from peftk.format.dynamic8 import thresholds8, values8, zero_code8
from peftk.ops import blockwise8_dequantize, blockwise8_quantize


def nearest(x: torch.Tensor, block_size: int, signed: bool) -> torch.Tensor:
    """argmin over all values in fp64; torch.argmin's first minimum is the lower code."""
    codes = []
    for block in x.float().reshape(-1).split(block_size):
        absmax = block.abs().max()
        scaled = (block * (1 / absmax)).double()
        distance = (scaled[:, None] - values8(signed).double()).abs()
        codes.append(distance.argmin(1) if absmax else torch.full(block.shape, zero_code8(signed)))
    return torch.cat(codes).to(torch.uint8).reshape(x.shape)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(5, 80), (2, 1030), (1, 1), (33, 33), (1000,)], ids=str)
def test_nearest_code(implementation, shape, signed):
    x = row_scaled(*shape) if signed else row_scaled(*shape).abs()
    for block_size in (64, 256, 7):
        codes, absmax = blockwise8_quantize(x, block_size, signed)
        assert torch.equal(codes, nearest(x, block_size, signed))
        assert absmax.tolist() == [b.abs().max().item() for b in x.view(-1).split(block_size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(implementation, dtype):
    x = row_scaled(9, 700, dtype=dtype)
    assert torch.equal(blockwise8_quantize(x)[0], nearest(x, 256, True))


@pytest.mark.parametrize("signed", [True, False])
def test_ties_go_to_the_lower_code(implementation, signed):
    """A threshold itself stays below, the next fp32 number goes up; absmax is 1 by the first element."""
    t = thresholds8(signed)
    for x, shift in ((t, 0), (torch.nextafter(t, torch.tensor(2.0)), 1)):
        codes, _ = blockwise8_quantize(torch.cat([torch.ones(1), x]), 256, signed)
        assert codes[1:].tolist() == [i + shift for i in range(255)]


@pytest.mark.parametrize("signed", [True, False])
def test_zero_stays_zero(implementation, signed):
    """bitsandbytes' CPU path turns an exact 0 into 2.1e-5 of the block's absmax."""
    x = torch.rand(4, 256)
    x[:, ::3], x[2] = 0, 0
    codes, absmax = blockwise8_quantize(x, 256, signed)
    back = blockwise8_dequantize(codes, absmax, 256, signed=signed)
    assert (back[x == 0] == 0).all() and not back[x == 0].signbit().any() and absmax[2] == 0


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="block_size: expected a positive number, got 0"):
        blockwise8_quantize(torch.ones(4), 0)
    with pytest.raises(TypeError, match="x: expected a floating-point tensor, got torch.int32"):
        blockwise8_quantize(torch.ones(4, dtype=torch.int32))


def test_opcheck():
    torch.library.opcheck(torch.ops.peftk.blockwise8_quantize.default, (row_scaled(3, 70), 64, True))
