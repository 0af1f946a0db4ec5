"""nf4_dequantize against an independent definition in numpy, bitsandbytes, and itself on every implementation."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
from numerics import row_scaled

import peftk
from peftk.format.code4 import BLOCK_SIZES, CODES4
from peftk.format.dynamic8 import values8
from peftk.native import native
from peftk.ops import nf4_dequantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def define(w4: peftk.NF4Weight) -> np.ndarray:
    """fp32 values, one element at a time; each rounding of the formats' text is one numpy operation."""
    table = np.array(CODES4[w4.quant_type].values, np.float32)
    packed, absmax = w4.packed.numpy().reshape(-1), w4.absmax.numpy()
    values = []
    for i in range(w4.shape.numel()):
        code, block = packed[i // 2] >> 4 if i % 2 == 0 else packed[i // 2] & 15, i // w4.block_size
        scale = absmax[block]
        if w4.absmax_scale is not None:
            scale = np.float32(values8().numpy()[scale] * w4.absmax_scale.numpy()[block // 256])
            scale = np.float32(scale + w4.absmax_offset.numpy())
        values.append(np.float32(table[code] * scale))
    return np.array(values, np.float32).reshape(w4.shape)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(5, 80), (7, 96), (2, 4304), (1, 1), (33, 33), (129,), (3, 5, 7), (0, 4)], ids=str)
def test_equals_the_definition(implementation, shape, double_quant):
    for quant_type in CODES4:
        w4 = peftk.quantize_nf4(row_scaled(*shape), double_quant=double_quant, quant_type=quant_type)
        expected = torch.from_numpy(define(w4))
        for dtype in DTYPES:
            assert torch.equal(w4.dequantize(dtype), expected.to(dtype)), dtype


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes(implementation, block_size):
    w4 = peftk.quantize_nf4(row_scaled(9, 1030), block_size)
    with peftk.use("reference"):
        expected = w4.dequantize(torch.bfloat16)
    assert torch.equal(w4.dequantize(torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_and_huge_scales(implementation, dtype):
    """Denormal results are kept, overflow becomes Inf: as a plain conversion from fp32 has it."""
    packed = torch.randint(0, 256, (32 * 8,), dtype=torch.uint8)
    absmax = torch.tensor([1e-45, 1e-40, 3e-39, 6e-8, 1e-5, 7e4, 3.3e38, float("inf")])
    got = nf4_dequantize(packed, absmax, None, None, (8, 64), dtype=dtype)
    codes = torch.stack([packed >> 4, packed & 15], 1).view(8, 64).int()
    expected = (torch.tensor(CODES4["nf4"].values)[codes] * absmax[:, None]).to(dtype)
    assert torch.equal(got.nan_to_num(nan=123.0), expected.nan_to_num(nan=123.0))


def test_zeros_are_positive(implementation):
    """Whatever wrote the block (CUDA stores code 0 and absmax 0, double quantisation may leave a negative constant)."""
    for code, absmax in ((0x00, 0.0), (0x77, 0.0), (0x77, -1e-3)):
        out = nf4_dequantize(torch.full((32,), code, dtype=torch.uint8), torch.tensor([absmax]), None, None, (64,))
        assert (out == 0).all() and not out.signbit().any()
    w = row_scaled(8, 64)
    w[3] = 0
    assert not peftk.quantize_nf4(w).dequantize()[3].signbit().any()


@pytest.mark.parametrize("shape", [(8, 96), (8, 80), (4, 48), (64, 64), (17, 130)], ids=str)
def test_no_element_is_off_by_more_than_half_a_gap(implementation, shape):
    """In units of its own block's absmax; on these shapes bitsandbytes' CPU path takes scales of other blocks."""
    w = row_scaled(*shape)
    back = peftk.quantize_nf4(w, 64, double_quant=False).dequantize()
    absmax = torch.cat([b.abs().max().expand(len(b)) for b in w.view(-1).split(64)]).view(shape)
    widest_gap = torch.tensor(CODES4["nf4"].values).diff().max()
    assert ((back - w).abs() <= absmax * (widest_gap / 2 + 1e-6)).all()


def test_equals_bitsandbytes_where_it_is_right(implementation):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = row_scaled(64, 256)
    theirs, state = functional.quantize_4bit(w, quant_type="nf4", blocksize=64)
    ours = nf4_dequantize(theirs, state.absmax, None, None, (64, 256), dtype=torch.float32)
    assert torch.equal(ours, functional.dequantize_4bit(theirs, state))


def test_out(implementation):
    w4 = peftk.quantize_nf4(row_scaled(64, 192))
    out = torch.empty(64, 192, dtype=torch.bfloat16)
    assert w4.dequantize(out=out) is out and torch.equal(out, w4.dequantize(torch.bfloat16))
    big = peftk.quantize_nf4(row_scaled(1024, 4096))  # large enough for the streaming stores
    out = torch.empty(1024, 4096, dtype=torch.bfloat16)
    with peftk.use("reference"):
        expected = big.dequantize(torch.bfloat16)
    assert torch.equal(big.dequantize(out=out), expected)
    unaligned = torch.empty(1024 * 4096 + 1, dtype=torch.bfloat16)[1:].view(1024, 4096)
    assert torch.equal(big.dequantize(out=unaligned), expected)
    for bad in (out.T, out[:512], torch.empty(4096, 2048, dtype=torch.bfloat16)[:, ::2]):
        with pytest.raises(ValueError, match="out: expected a contiguous tensor of shape"):
            big.dequantize(out=bad)


def test_independent_of_threads(implementation):
    w4, threads = peftk.quantize_nf4(row_scaled(64, 640)), torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(w4.dequantize())
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("tier", ["scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
def test_any_range_of_elements(tier):
    """The kernel decodes a part, from an odd element and across blocks: what panels of a matrix need."""
    if native() is None or tier not in native().available_tiers():
        pytest.skip(f"{tier} does not run here")
    w4 = peftk.quantize_nf4(row_scaled(7, 333))
    expected = w4.dequantize(torch.float32).view(-1)
    with peftk.use(f"cpu-{tier}"):
        for first, count in ((0, 1), (1, 1), (63, 2), (333, 333), (1000, 331), (64, 128), (2330, 1), (5, 0)):
            out = torch.full((count + 2,), -7.0)
            parts = (w4.packed, w4.absmax, w4.absmax_scale, w4.absmax_offset)
            native().nf4_dequantize(*(t.data_ptr() for t in parts), first, count, 64, 0, out[1:].data_ptr(), 0, 2)
            assert torch.equal(out[1:-1], expected[first : first + count])
            assert out[0] == -7 and out[-1] == -7


def test_indices_beyond_32_bits():
    """Elements around 2^31 and 2^32 of a weight whose codes lie in a sparse mapping, so that it fits memory."""
    if native() is None:
        pytest.skip("no native module")
    count = 2**32 + 256
    memory = mmap.mmap(-1, count // 2)
    packed = np.frombuffer(memory, np.uint8)
    absmax = torch.zeros(count // 64)
    for first in (2**31 - 64, 2**31, 2**32 + 128):
        packed[first // 2 : first // 2 + 32] = 0xF0
        absmax[first // 64] = first // 64 + 1
        out = torch.empty(64)
        native().nf4_dequantize(packed.ctypes.data, absmax.data_ptr(), 0, 0, first, 64, 64, 0, out.data_ptr(), 0, 1)
        assert torch.equal(out, torch.tensor([1.0, -1.0]).repeat(32) * absmax[first // 64])


def test_bad_arguments_are_named():
    w4 = peftk.quantize_nf4(row_scaled(4, 64))
    packed, absmax, scale, offset = w4.tensors()
    with pytest.raises(ValueError, match="packed: expected 64 bytes for 128 elements, got 128"):
        nf4_dequantize(packed, absmax, scale, offset, (2, 64))
    with pytest.raises(TypeError, match="absmax: expected torch.float32 without absmax_scale, got torch.uint8"):
        nf4_dequantize(packed, absmax, None, None, (4, 64))
    with pytest.raises(ValueError, match="absmax: expected 4 values"):
        nf4_dequantize(packed, absmax[:3], scale, offset, (4, 64))
    with pytest.raises(ValueError, match="absmax_scale, absmax_offset: expected both or neither, got absmax_scale and None"):
        nf4_dequantize(packed, absmax, scale, None, (4, 64))
    with pytest.raises(TypeError, match="packed: expected uint8, got torch.int8"):
        nf4_dequantize(packed.to(torch.int8), absmax, scale, offset, (4, 64))


def test_opcheck():
    w4 = peftk.quantize_nf4(row_scaled(3, 70))
    arguments = (*w4.tensors(), w4.shape, 64, "nf4")
    torch.library.opcheck(torch.ops.peftk.nf4_dequantize.default, (*arguments, torch.bfloat16))
    torch.library.opcheck(torch.ops.peftk.nf4_dequantize_.default, (*arguments, torch.empty(3, 70)))
