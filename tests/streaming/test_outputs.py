"""Weights copied, cast and quantised in pieces are what they are as a whole, and their errors are those of the whole."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from streaming.conftest import weight

import peftk
from peftk.format.nf4 import NF4Weight
from peftk.streaming import values as values_module
from peftk.streaming.outputs import Cast, Copied, Quantised
from peftk.streaming.safetensors_file import Writer
from peftk.streaming.source import from_tensors
from peftk.streaming.values import FileValues, NF4Values, Transposed, ranges


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that small weights are many pieces."""
    monkeypatch.setattr(values_module, "CHUNK", 1 << 14)


def stored(w: torch.Tensor) -> FileValues:
    return FileValues(from_tensors({"w": w})["w"])


def written(output, tmp_path):
    """(the file's tensors, the error)."""
    file = Writer(tmp_path / "a.safetensors", output.entries)
    error = output.write(file)
    file.finish()
    file.close()
    return load_file(tmp_path / "a.safetensors"), error


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype", "block"),
    [
        ((130, 576), torch.float32, 64),
        ((301, 129), torch.bfloat16, 64),
        ((7, 5003), torch.float16, 32),
        ((3, 5), torch.float32, 4096),
    ],
)
def test_the_bytes_are_those_of_the_whole(tmp_path, shape, dtype, block, double_quant):
    w = weight(*shape, dtype=dtype)
    found, error = written(Quantised("a.weight", stored(w), dtype, block, double_quant), tmp_path)
    w4 = peftk.quantize_nf4(w, block, double_quant)
    expected = w4.state_dict("a.")
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    off = w4.dequantize(torch.float32) - w.float()
    assert error.layer == "a" and error.kind == "nf4" and error.shape == shape
    assert error.relative == pytest.approx((off.norm() / w.float().norm()).item(), rel=1e-5)
    assert error.largest == off.abs().max().item()


def test_a_conv1d_is_turned(tmp_path):
    w = weight(200, 160)
    found, _ = written(Quantised("a.weight", Transposed(stored(w)), w.dtype), tmp_path)
    assert torch.equal(found["a.weight"], peftk.quantize_nf4(w.T.contiguous()).state_dict("a.")["a.weight"])


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_weight_in_4_bits_is_decoded_in_pieces(double_quant):
    w4 = peftk.quantize_nf4(weight(130, 321), double_quant=double_quant)
    values = NF4Values("a.weight", from_tensors(w4.state_dict("a.")))
    for _ in range(2):  # after a release too
        parts = [values.flat(start, stop) for start, stop in ranges(values)]
        assert len(parts) > 1 and torch.equal(torch.cat(parts), w4.dequantize(torch.float32).view(-1))
        values.release()


def test_a_broken_weight_in_4_bits_names_its_key():
    entries = from_tensors(peftk.quantize_nf4(weight(8, 64)).state_dict("a."))
    entries["a.weight.absmax"] = from_tensors({"x": torch.zeros(3, dtype=torch.uint8)})["x"]
    with pytest.raises(ValueError, match="a.weight.absmax: expected 8 values"):
        NF4Values("a.weight", entries)


def test_nan_names_the_weight_and_its_index(tmp_path):
    w = weight(100, 400)
    w[83, 17] = math.nan
    with pytest.raises(ValueError, match=r"a.weight: expected finite values, got nan at index \(83, 17\)"):
        written(Quantised("a.weight", stored(w), w.dtype), tmp_path)


def test_the_error_of_the_base_alone(tmp_path):
    w, base = weight(90, 256), weight(90, 256, seed=1)
    _, error = written(Quantised("a.weight", stored(w), w.dtype, base=stored(base)), tmp_path)
    off = peftk.quantize_nf4(base).dequantize() - base
    assert error.base == pytest.approx((off.norm() / base.norm()).item(), rel=1e-5)


def test_cast_and_copied(tmp_path):
    w = weight(130, 321)
    found, error = written(Cast("a", stored(w), torch.bfloat16, measured=True), tmp_path)
    assert torch.equal(found["a"], w.bfloat16())
    assert error.relative == pytest.approx(((w.bfloat16().float() - w).norm() / w.norm()).item(), rel=1e-5)
    found, error = written(Copied("a", from_tensors({"a": w})["a"]), tmp_path)
    assert torch.equal(found["a"], w) and error is None


def test_what_leaves_fp16s_range_is_named(tmp_path):
    w = weight(4, 4) * 1e5
    with pytest.raises(ValueError, match="a: expected values in torch.float16's range, got one of .*e"):
        written(Cast("a", stored(w), torch.float16), tmp_path)


def test_an_odd_number_of_elements_in_odd_pieces(tmp_path):
    """The last byte holds one code."""
    w = weight(5, 16385)
    found, _ = written(Quantised("a.weight", stored(w), w.dtype), tmp_path)
    assert torch.equal(NF4Weight.from_state_dict(found, "a.").dequantize(), peftk.quantize_nf4(w).dequantize())
