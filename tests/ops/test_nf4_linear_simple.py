"""The CUDA kernels that take every shape: nf4_linear_simple, nf4_linear_dx_simple and nf4_linear_decode, on the host and as PTX."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import row_scaled

import peftk
from emulation import doors
from peftk.format.code4 import code4
from peftk.native import NATIVE_DTYPE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cuda-host", "cuda-ptx"])
def door(request: pytest.FixtureRequest) -> Any:
    if reason := doors.why_not(request.param):
        pytest.skip(reason)
    return doors.door(request.param)


def wired(w4: peftk.NF4Weight) -> tuple:
    """Weight4 of csrc/format/weight4.h."""
    return (*w4.tensors(), w4.shape[0], w4.block_size, code4(w4.quant_type).number)


def quantized(n: int, k: int, block_size: int = 64, quant_type: str = "nf4", double_quant: bool = True) -> peftk.NF4Weight:
    return peftk.quantize_nf4(row_scaled(n, k), block_size, double_quant, quant_type=quant_type)


# ---- decode -----------------------------------------------------------------------------------------------------------------

# n, k, block, then rows and columns: tiles that overlap, a tile alone, and what only the general path takes
CHUNKS = [
    (40, 640, 64, (3, 37), (128, 640)),
    (16, 256, 256, (0, 16), (0, 256)),
    (21, 448, 4096, (1, 18), (64, 448)),
    (9, 128, 64, (2, 5), (64, 128)),
    (13, 77, 32, (4, 13), (5, 70)),
    (6, 96, 64, (0, 6), (0, 96)),
    (33, 33, 128, (0, 33), (0, 33)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CHUNKS, ids=str)
def test_a_chunk_is_what_dequantize_gives(door, case, dtype):
    n, k, block_size, rows, columns = case
    for quant_type, double_quant in (("nf4", True), ("fp4", False)):
        w4 = quantized(n, k, block_size, quant_type, double_quant)
        out = torch.full((rows[1] - rows[0] + 2, columns[1] - columns[0]), float("nan"), dtype=dtype)
        extent = (rows[0], rows[1] - rows[0], columns[0], columns[1] - columns[0])
        door.call("nf4_linear_decode", wired(w4), k, *extent, out[1:-1], NATIVE_DTYPE[dtype])
        assert torch.equal(out[1:-1], w4.dequantize(dtype)[slice(*rows), slice(*columns)])
        assert out[0].isnan().all() and out[-1].isnan().all()


def test_a_chunk_with_tiny_scales_and_on_odd_addresses(door):
    """Products that round to zero are +0; codes and results where no wide access may go."""
    w4 = quantized(16, 256, double_quant=False)
    w4.absmax.copy_(torch.tensor([-1e-45, 1e-40, 3e-39, -0.0]).repeat(16))
    shifted = torch.cat([w4.packed.view(-1)[:1], w4.packed.view(-1)])[1:]
    for packed, first in ((w4.packed, 0), (w4.packed, 1), (shifted, 0)):
        out = torch.full((16 * 256 + 8,), float("nan"))[first : first + 16 * 256].view(16, 256)
        door.call("nf4_linear_decode", (packed, *wired(w4)[1:]), 256, 0, 16, 0, 256, out, NATIVE_DTYPE[torch.float32])
        assert torch.equal(out, w4.dequantize()) and torch.equal(out.signbit(), w4.dequantize().signbit())


def test_a_chunk_reads_each_byte_once(door):
    if not hasattr(door, "reports"):
        pytest.skip("the host counts no bytes")
    w4 = quantized(64, 1024, double_quant=False)
    out = torch.empty(32, 512, dtype=torch.bfloat16)
    door.call("nf4_linear_decode", wired(w4), 1024, 16, 32, 256, 512, out, NATIVE_DTYPE[out.dtype])
    ((_, report),) = door.reports
    words, scales = 32 * 512 // 8, 32 * 512 // 64
    table = report.threads // 1024 * 256 * 16 * 3  # parameters that are indexed count as global memory
    assert report.accesses["global", "load", 4] == words + scales + table
    assert report.bytes_loaded["global"] == 4 * report.accesses["global", "load", 4]
    assert report.bytes_stored["global"] == out.nbytes and report.wide_share("global", "store") == 1
