"""The dynamic 8-bit tables against C++, bitsandbytes and the properties that make a code the nearest one."""

from __future__ import annotations

import pytest
import torch

from peftk.format.dynamic8 import NESTED_BLOCK, thresholds8, values8, zero_code8
from peftk.native import native, why_not_native

both = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


@both
def test_equals_cpp(signed: bool):
    if native() is None:
        pytest.skip(why_not_native())
    values, thresholds = native().code8(signed)
    assert values8(signed).tolist() == list(values) and thresholds8(signed).tolist() == list(thresholds)


@both
def test_equals_bitsandbytes(signed: bool):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(values8(signed), functional.create_dynamic_map(signed))


@both
def test_shape_of_the_table(signed: bool):
    values = values8(signed)
    assert values.dtype == torch.float32 and values.shape == (256,) and bool((values.diff() > 0).all())
    assert values[zero_code8(signed)] == 0 and values[-1] == 1
    if signed:  # symmetric but for 0 and 1
        assert torch.equal(values[:127], -values[128:255].flip(0)) and values[0] == pytest.approx(-0.992968738079071, abs=0)
    else:
        assert values[1] == pytest.approx(3.25e-7, rel=1e-6) and values[-2] == pytest.approx(0.9964843988418579, abs=0)
    assert NESTED_BLOCK == 256


@both
def test_a_threshold_is_the_last_number_of_the_lower_code(signed: bool):
    """At the threshold the lower value is at least as near, just above it the upper one is nearer; in fp64."""
    values, t = values8(signed).double(), thresholds8(signed)
    above = torch.nextafter(t, torch.full_like(t, torch.inf)).double()
    lower, upper, t = values[:-1], values[1:], t.double()
    assert bool((t - lower <= upper - t).all()) and bool((upper - above < above - lower).all())


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16, "meta"], ids=str)
def test_first_use_under_other_defaults(default):
    """The tables are cached at first use: a model that is being loaded in bf16 then must not spoil them."""
    expected = [(values8(s), thresholds8(s)) for s in (True, False)]
    values8.cache_clear(), thresholds8.cache_clear()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(before if default == "meta" else default)
        with torch.device("meta" if default == "meta" else "cpu"):
            got = [(values8(s), thresholds8(s)) for s in (True, False)]
    finally:
        torch.set_default_dtype(before)
        values8.cache_clear(), thresholds8.cache_clear()
    for tables, theirs in zip(got, expected, strict=True):
        for table, other in zip(tables, theirs, strict=True):
            assert table.dtype == torch.float32 and table.device.type == "cpu" and torch.equal(table, other)
