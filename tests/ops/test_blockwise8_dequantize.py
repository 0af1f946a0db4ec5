"""blockwise8_dequantize against the table, and against bitsandbytes."""

from __future__ import annotations

import pytest
import torch
from numerics import row_scaled

from peftk.format.dynamic8 import values8
from peftk.ops import blockwise8_dequantize, blockwise8_quantize


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [256, 1030, 1, 0])
def test_equals_the_table(implementation, count, dtype, signed):
    codes = torch.randint(0, 256, (count,), dtype=torch.uint8)
    absmax = torch.rand(-(-count // 64)) + 0.1
    scale = torch.cat([absmax, absmax.new_empty(0)]).repeat_interleave(64)[:count]
    expected = (values8(signed)[codes.long()] * scale).to(dtype)
    got = blockwise8_dequantize(codes, absmax, 64, dtype, signed)
    assert got.dtype == dtype and torch.equal(got, expected)


def test_every_value_comes_back(implementation):
    values = values8(True)
    codes, absmax = blockwise8_quantize(values, 256)
    assert codes.tolist() == list(range(256)) and torch.equal(blockwise8_dequantize(codes, absmax, 256), values)


def test_equals_bitsandbytes(implementation):
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, absmax = blockwise8_quantize(row_scaled(8, 512), 256)
    theirs = functional.dequantize_blockwise(codes, absmax=absmax, code=values8(True), blocksize=256)
    assert torch.equal(blockwise8_dequantize(codes, absmax, 256), theirs)


def test_bad_arguments_are_named():
    codes, absmax = torch.zeros(100, dtype=torch.uint8), torch.ones(2)
    with pytest.raises(TypeError, match="codes: expected uint8, got torch.int64"):
        blockwise8_dequantize(codes.long(), absmax, 64)
    with pytest.raises(TypeError, match="absmax: expected fp32, got torch.float64"):
        blockwise8_dequantize(codes, absmax.double(), 64)
    with pytest.raises(ValueError, match="absmax: expected 4 values for 100 codes in blocks of 32, got 2"):
        blockwise8_dequantize(codes, absmax, 32)


def test_opcheck():
    arguments = (torch.zeros(100, dtype=torch.uint8), torch.ones(2), 64, True, torch.bfloat16)
    torch.library.opcheck(torch.ops.peftk.blockwise8_dequantize.default, arguments)
