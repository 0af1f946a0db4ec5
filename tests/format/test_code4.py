"""The 4-bit tables against C++, bitsandbytes and their own construction."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from peftk.format.code4 import BLOCK_SIZES, CODES4, FP4, NF4, code4, values4
from peftk.native import native, why_not_native

CPU = torch.device("cpu")


def fp32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def quantile(p: torch.Tensor) -> torch.Tensor:
    """The inverse of the normal distribution's cumulative function, fp64."""
    return math.sqrt(2) * torch.erfinv(2 * p - 1)


@pytest.mark.parametrize("name", sorted(CODES4))
def test_equals_cpp(name: str):
    if native() is None:
        pytest.skip(why_not_native())
    values, thresholds = native().code4(CODES4[name].number)
    assert tuple(values) == CODES4[name].values and tuple(thresholds) == CODES4[name].thresholds


@pytest.mark.parametrize("name", sorted(CODES4))
def test_equals_bitsandbytes(name: str):
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.get_4bit_type(name, device="cpu")
    assert theirs.view(torch.int32).tolist() == values4(name, CPU).view(torch.int32).tolist()  # the sign of zero included


@pytest.mark.parametrize("name", sorted(CODES4))
def test_every_number_is_an_fp32(name: str):
    code = CODES4[name]
    for numbers in (code.values, code.thresholds):
        assert fp32(numbers).tolist() == list(numbers)


@pytest.mark.parametrize("name", sorted(CODES4))
def test_thresholds_separate_the_values(name: str):
    """Ranks ascend in value, every code has one rank, and a value is never on the wrong side of a threshold."""
    code = CODES4[name]
    assert sorted(code.code_of_rank) == list(range(16))
    by_rank = [code.values[c] for c in code.code_of_rank]
    assert list(code.thresholds) == sorted(set(code.thresholds))
    for rank, value in enumerate(by_rank):
        below = sum(value > t for t in code.thresholds)
        assert below == rank or value == 0.0  # FP4 has two zeros; x = 0 is read as +0
    assert code.values[code.code_of_zero] == 0.0 and math.copysign(1, code.values[code.code_of_zero]) == 1
    zero_rank = sum(0.0 > t for t in code.thresholds)
    assert code.code_of_rank[zero_rank] == code.code_of_zero


def test_nf4_from_the_quantiles_of_the_normal_distribution():
    """Dettmers et al. 2023, appendix E: quantiles at evenly spaced probabilities, 8 above zero and 7 below, one exact zero."""
    offset = 0.9677083
    positive = quantile(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -quantile(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    # The offset has seven digits, and the published table was made with fp32 probabilities: equal to 2^-24 of a unit or so.
    torch.testing.assert_close(values / values.max(), torch.tensor(NF4.values, dtype=torch.float64), rtol=0, atol=2e-7)

    def in_fp32(points: int) -> torch.Tensor:
        return quantile(torch.linspace(offset, 0.5, points, dtype=torch.float32)[:-1].double())

    exact = torch.cat([-in_fp32(8), torch.zeros(1, dtype=torch.float64), in_fp32(9)]).float().sort().values
    assert (exact / exact.max()).tolist() == list(NF4.values)


def test_nf4_thresholds_are_midpoints_but_for_four():
    values = fp32(NF4.values)
    midpoints, thresholds = (values[:-1] + values[1:]) / 2, fp32(NF4.thresholds)
    assert (midpoints != thresholds).nonzero().flatten().tolist() == [0, 8, 12, 14]
    apart = (midpoints.view(torch.int32) - thresholds.view(torch.int32)).abs()
    assert apart.max() == 1  # ulp


def test_fp4_thresholds_mirror():
    """|x| > t with the sign apart: the negative side holds the numbers just below -t."""
    positive = fp32([0.0, *FP4.thresholds[8:]])
    negative = torch.nextafter(-positive, torch.full_like(positive, -math.inf))
    assert negative.flip(0).tolist() == list(FP4.thresholds[:8])
    magnitudes = sorted(FP4.values[:8])
    for low, high, t in zip(magnitudes[:-1], magnitudes[1:], FP4.thresholds[8:], strict=True):
        assert t == pytest.approx((low + high) / 2, rel=2e-6)


def test_names_and_devices():
    with pytest.raises(ValueError, match=r"quant_type: expected one of \['fp4', 'nf4'\], got 'int4'"):
        code4("int4")
    assert code4("nf4") is NF4 and values4("nf4", torch.device("meta")).is_meta
    assert BLOCK_SIZES == (32, 64, 128, 256, 512, 1024, 2048, 4096)


def test_import_under_other_defaults():
    """transformers imports and builds models under another default dtype or device: the tables may not take it over."""
    program = """
import torch
torch.set_default_dtype(torch.bfloat16); torch.set_default_device("meta")
from peftk.format.code4 import CODES4, values4
for name, code in CODES4.items():
    table = values4(name, torch.device("cpu"))
    assert table.dtype == torch.float32 and table.tolist() == list(code.values)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
