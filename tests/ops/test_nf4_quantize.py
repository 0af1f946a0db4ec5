"""nf4_quantize against an independent definition in numpy, bitsandbytes, and itself on every implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numerics import row_scaled

import peftk
from peftk.format.code4 import BLOCK_SIZES, CODES4
from peftk.ops import nf4_quantize

RAGGED = [(5, 80), (7, 96), (2, 4304), (1, 1), (33, 33), (64, 64), (129,), (3, 5, 7), (0,), (1, 4097)]


def define(w: np.ndarray, block_size: int, quant_type: str) -> tuple[np.ndarray, np.ndarray]:
    """One element at a time, as the formats' text has it."""
    code, flat = CODES4[quant_type], w.astype(np.float32).reshape(-1)
    thresholds = [np.float32(t) for t in code.thresholds]
    codes, absmax = [], []
    for start in range(0, len(flat), block_size):
        block = flat[start : start + block_size]
        biggest = np.abs(block).max()
        absmax.append(biggest)
        for value in block:
            scaled = np.float32(value * (np.float32(1) / biggest)) if biggest else None
            codes.append(code.code_of_rank[sum(scaled > t for t in thresholds)] if biggest else code.code_of_zero)
    codes += [code.code_of_zero] * (len(codes) % 2)
    packed = np.array(codes[::2], np.uint8) << 4 | np.array(codes[1::2], np.uint8)
    return packed, np.array(absmax, np.float32)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_equals_the_definition(implementation, shape, quant_type):
    w = row_scaled(*shape)
    packed, absmax = nf4_quantize(w, 64, quant_type)
    expected, expected_absmax = define(w.numpy(), 64, quant_type)
    assert packed.numpy().tolist() == expected.tolist()
    assert absmax.numpy().tolist() == expected_absmax.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes_and_dtypes(implementation, block_size, dtype):
    w = row_scaled(9, 1030, dtype=dtype)
    packed, absmax = nf4_quantize(w, block_size)
    with peftk.use("reference"):
        expected, expected_absmax = nf4_quantize(w.float(), block_size)
    assert torch.equal(packed, expected) and torch.equal(absmax, expected_absmax)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_ties_and_their_neighbours(implementation, quant_type):
    """Each threshold and the fp32 numbers beside it, in a block with absmax 1: strictly above moves up a rank."""
    code = CODES4[quant_type]
    t = torch.tensor(code.thresholds)
    below, above = torch.nextafter(t, torch.tensor(-2.0)), torch.nextafter(t, torch.tensor(2.0))
    w = torch.cat([torch.ones(1), t, below, above, torch.zeros(2)])
    codes = torch.stack([nf4_quantize(w, 64, quant_type)[0] >> 4, nf4_quantize(w, 64, quant_type)[0] & 15], 1).view(-1)
    ranks = [code.code_of_rank.index(c) for c in codes.tolist()]
    assert ranks[1:16] == list(range(15))
    assert ranks[16:31] == list(range(15))
    assert ranks[31:46] == list(range(1, 16))


def test_all_sixteen_codes_come_back(implementation):
    w = torch.tensor(CODES4["nf4"].values).repeat(8, 4) * torch.arange(1, 9)[:, None]
    packed, _ = nf4_quantize(w, 64)
    codes = torch.stack([packed >> 4, packed & 15], 1).view(8, 64)
    assert torch.equal(codes, torch.arange(16).repeat(8, 4).to(torch.uint8))


def test_zero_blocks(implementation):
    w = row_scaled(4, 64)
    w[1], w[2, 1:] = 0, 0
    packed, absmax = nf4_quantize(w)
    assert absmax[1] == 0 and packed[32:64].tolist() == [0x77] * 32
    packed, absmax = nf4_quantize(w, 64, "fp4")
    assert absmax[1] == 0 and packed[32:64].tolist() == [0] * 32


def test_non_contiguous_and_read_only(implementation):
    w = row_scaled(40, 66)
    assert torch.equal(nf4_quantize(w.T)[0], nf4_quantize(w.T.contiguous())[0])
    assert torch.equal(nf4_quantize(w[:, 1:65])[0], nf4_quantize(w[:, 1:65].clone())[0])


def test_independent_of_threads(implementation):
    w, threads = row_scaled(64, 640), torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(peftk.quantize_nf4(w))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0].tensors(), other.tensors(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_bitsandbytes(implementation, dtype):
    """Codes of bitsandbytes' CPU path differ only where its midpoints lie an ulp beside the CUDA thresholds; absmax never."""
    functional = pytest.importorskip("bitsandbytes.functional")
    w = row_scaled(128, 256, dtype=dtype)
    theirs, state = functional.quantize_4bit(w, quant_type="nf4", blocksize=64)
    packed, absmax = nf4_quantize(w)
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(packed, theirs.view(-1))


def test_double_quantisation_step_by_step(implementation):
    """QLoRA section 3: offset = mean in fp64 rounded once, signed dynamic code, blocks of 256."""
    w = row_scaled(300, 128)
    w4 = peftk.quantize_nf4(w)
    _, absmax = nf4_quantize(w)
    assert w4.absmax_offset.item() == np.float32(math.fsum(absmax.tolist()) / absmax.numel())
    centred = absmax - w4.absmax_offset
    assert w4.absmax_scale.tolist() == [centred[i : i + 256].abs().max().item() for i in range(0, len(centred), 256)]
    assert w4.absmax.dtype == torch.uint8 and w4.nbytes == 300 * 64 + 600 + 4 * 3 + 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("double_quant", [True, False])
def test_nonfinite_is_an_error_that_names_the_place(implementation, bad, double_quant):
    w = row_scaled(6, 70)
    w[3, 11], w[5, 2] = bad, bad
    with pytest.raises(ValueError, match=r"layers\.0\.weight: expected finite values, got -?(nan|inf) at index \(3, 11\)"):
        peftk.quantize_nf4(w, double_quant=double_quant, name="layers.0.weight")


def test_nonfinite_kept_touches_only_its_block(implementation):
    w = row_scaled(4, 64)
    clean = peftk.quantize_nf4(w, double_quant=False).dequantize()
    w[2, 5] = float("nan")
    kept = peftk.quantize_nf4(w, double_quant=False, nonfinite="keep").dequantize()
    assert torch.equal(kept[[0, 1, 3]], clean[[0, 1, 3]]) and kept[2].isnan().all()
    with pytest.raises(ValueError, match="double_quant=False"):
        peftk.quantize_nf4(w, nonfinite="keep")


def test_bad_arguments_are_named():
    w = torch.ones(4, 64)
    with pytest.raises(ValueError, match=r"block_size: expected one of .*4096\), got 48"):
        peftk.quantize_nf4(w, block_size=48)
    with pytest.raises(TypeError, match="w: expected a floating-point tensor of 16 bits or more, got torch.int64"):
        peftk.quantize_nf4(w.long())
    with pytest.raises(ValueError, match="quant_type: expected one of .*got 'int4'"):
        peftk.quantize_nf4(w, quant_type="int4")
    with pytest.raises(ValueError, match="nonfinite: expected"):
        peftk.quantize_nf4(w, nonfinite="ignore")


@pytest.mark.full
def test_more_than_two_to_the_31_elements():
    """The last blocks lie beyond every 32-bit index; 4.3 GB of bf16 and 1.1 GB of codes."""
    count = 2**31 + 96
    w = torch.zeros(count, dtype=torch.bfloat16)
    tail = row_scaled(2, 64, dtype=torch.bfloat16).view(-1)
    w[-128:] = tail
    packed, absmax = nf4_quantize(w)
    expected, expected_absmax = nf4_quantize(torch.cat([torch.zeros(32, dtype=torch.bfloat16), tail]))
    assert torch.equal(packed[-80:], expected) and torch.equal(absmax[-3:], expected_absmax)


def test_opcheck():
    torch.library.opcheck(torch.ops.peftk.nf4_quantize.default, (row_scaled(3, 70), 64, "nf4"))
