"""Triton's kernels in the emulator, bit for bit against the reference, where the ops' own tests (tests/ops) don't go."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from numerics import row_scaled

import peftk
from bench.static import triton_aot
from bench.static.launches import launched
from emulation import doors
from emulation.ptx import Memory, OutOfBounds, Program
from emulation.triton_door import PtxDoor, declared, laid_out
from peftk.ops import blockwise8_dequantize, blockwise8_quantize, gpu, nf4_dequantize, nf4_quantize

if why := doors.why_not("triton-ptx"):
    pytest.skip(why, allow_module_level=True)

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, signs of zeros included; one NaN is as good as another."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    if got.dtype == torch.uint8:
        assert torch.equal(got, expected)
    else:
        assert torch.equal(got.isnan(), expected.isnan())
        there = ~expected.isnan()
        assert torch.equal(got[there].view(BITS[got.dtype]), expected[there].view(BITS[got.dtype]))


def assert_both_same(call, door=None) -> None:
    """What Triton's kernels and what the reference make of a call."""
    with gpu.through("triton", door or doors.door("triton-ptx")), peftk.use("triton"):
        got = call()
    with peftk.use("reference"):
        expected = call()
    for ours, right in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (got, expected)), strict=True):
        assert_same(ours, right)


def behind(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose address is one element past a multiple of 16 bytes."""
    return torch.cat([tensor.new_zeros(1), tensor.view(-1)])[1:].view(tensor.shape)


def hard_blocks(block_size: int) -> torch.Tensor:
    """Blocks of NaN, Inf, zeros of both signs, denormals, and ordinary ones between; the last one is cut and odd."""
    w = row_scaled(24, block_size)
    for row, value in ((1, float("nan")), (3, float("inf")), (5, -float("inf")), (7, 3e38)):
        w[row, block_size // 2] = value
    w[9], w[11], w[13], w[15] = 0, -0.0, 1e-45, -3e-39
    w[17, 1:], w[19] = 0, torch.where(torch.arange(block_size) % 2 == 0, 1e-45, -3e-39)
    w[23] = 1e-45
    return w.view(-1)[: 24 * block_size - block_size // 2 + 1]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_quantize_of_hard_blocks(dtype, quant_type):
    w = hard_blocks(64).to(dtype)
    assert_both_same(lambda: nf4_quantize(w, 64, quant_type))


@pytest.mark.parametrize("block_size", [64, 7, 1, 4096])
def test_blockwise8_quantize_of_hard_blocks(block_size):
    x = hard_blocks(block_size)
    for signed in (True, False):
        assert_both_same(lambda signed=signed: blockwise8_quantize(x, block_size, signed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_dequantize_of_hard_scales(dtype):
    """Products that are denormal, that vanish, that overflow; scales of both signs."""
    scales = [0.0, -0.0, 1e-45, -1e-45, 4e-45, 1e-40, -3e-39, 6e-8, -6e-8, 7e4, -3.3e38, float("inf"), float("nan"), 1.0]
    packed = torch.arange(256, dtype=torch.uint8).repeat(len(scales))
    absmax = torch.tensor(scales).repeat_interleave(8)
    for code in ("nf4", "fp4"):
        assert_both_same(lambda code=code: nf4_dequantize(packed, absmax, None, None, (len(scales), 512), 64, code, dtype))


def test_turing_rounds_to_bf16_as_ampere_does():
    """It has no instruction for that: Triton emits integer arithmetic."""
    packed, absmax = torch.arange(256, dtype=torch.uint8).repeat(32), torch.cat([row_scaled(255), torch.tensor([float("nan")])])
    absmax[1:40:3] *= 1e-38
    call = lambda: nf4_dequantize(packed, absmax, None, None, (16384,), dtype=torch.bfloat16)  # noqa: E731
    assert_both_same(call, PtxDoor(75))
    w = row_scaled(4096, dtype=torch.bfloat16)
    assert_both_same(lambda: nf4_quantize(w), PtxDoor(75))


@pytest.mark.parametrize("block_size", [32, 48, 96, 6, 7, 1, 5000, 8192])
def test_nf4_dequantize_of_any_block_size(block_size):
    """Words of 8 codes that share a scale, that cross a block, that lie in a block of which the tile sees a part."""
    count = 2 * 4096 + 4
    blocks = -(-count // block_size)
    packed = torch.randint(0, 256, (count // 2,), dtype=torch.uint8)
    absmax, scale = torch.randint(0, 256, (blocks,), dtype=torch.uint8), torch.rand(-(-blocks // 256)) + 0.1
    parts = (packed, absmax, scale, torch.tensor(-0.125))
    assert_both_same(lambda: nf4_dequantize(*parts, (count,), block_size, dtype=torch.bfloat16))


@pytest.mark.parametrize("block_size", [64, 96, 7, 1, 5000])
def test_blockwise8_dequantize_of_any_block_size(block_size):
    codes = torch.randint(0, 256, (3 * 2048 + 5,), dtype=torch.uint8)
    absmax = row_scaled(-(-codes.numel() // block_size))
    assert_both_same(lambda: blockwise8_dequantize(codes, absmax, block_size, torch.bfloat16))


def test_unaligned_views():
    count = 4096 + 130
    w, packed = behind(row_scaled(count, dtype=torch.bfloat16)), behind(torch.arange(count // 2).to(torch.uint8))
    absmax, codes = behind(row_scaled(-(-count // 64))), behind(torch.arange(count).to(torch.uint8))
    out = torch.empty(count + 1, dtype=torch.bfloat16)[1:]
    assert w.data_ptr() % 16 == out.data_ptr() % 16 == 2 and packed.data_ptr() % 16 == codes.data_ptr() % 16 == 1
    assert_both_same(lambda: nf4_quantize(w))
    assert_both_same(lambda: nf4_dequantize(packed, absmax, None, None, (count,), out=out).clone())
    assert_both_same(lambda: nf4_dequantize(packed, absmax, None, None, (count,), dtype=torch.float32))
    assert_both_same(lambda: blockwise8_quantize(w, 256))
    assert_both_same(lambda: blockwise8_dequantize(codes, absmax, 64))
    on_words = torch.arange(4 + count // 2).to(torch.uint8)[4:]  # the path of whole tiles, by 4 bytes instead of 16
    assert_both_same(lambda: nf4_dequantize(on_words, absmax, None, None, (count,), dtype=torch.bfloat16))


def test_memory_is_moved_once_and_look_ups_do_not_conflict():
    """32-byte sectors against those that the tensors fill; a table of pairs would conflict 0.06 times a weight."""
    w, packed = row_scaled(64, 1024, dtype=torch.bfloat16), torch.randint(0, 256, (32768,), dtype=torch.uint8)
    absmax = row_scaled(1024)
    door = PtxDoor(traffic=True)
    assert_both_same(lambda: nf4_quantize(w), door)
    assert_both_same(lambda: nf4_dequantize(packed, absmax, None, None, (65536,), dtype=torch.bfloat16), door)
    for report in door.reports:
        assert report.traffic.conflicts == 0
        assert report.traffic.sectors < 1.1 * 65536 * (2 + 0.5) / 32
    assert door.reports[-1].wide_share("global", "store") == 1


def test_no_elements_launch_nothing():
    none, byte = torch.empty(0), torch.empty(0, dtype=torch.uint8)
    calls = (
        lambda: nf4_quantize(none), lambda: nf4_dequantize(byte, none, None, None, (0, 4)),
        lambda: blockwise8_quantize(none), lambda: blockwise8_dequantize(byte, none),
    )  # fmt: skip
    assert [launched(call) for call in calls] == [[], [], [], []]


def test_block_sizes_that_the_kernels_refuse():
    with gpu.through("triton", doors.door("triton-ptx")), peftk.use("triton"):
        with pytest.raises(RuntimeError, match=r"triton: block_size is 4097, the kernel takes up to 4096"):
            blockwise8_quantize(torch.ones(5000), 4097)
        with pytest.raises(RuntimeError, match=r"triton: block_size is 48, the kernel takes \(32, 64"):
            torch.ops.peftk.nf4_quantize(torch.ones(96), 48, "nf4")
        with pytest.raises(RuntimeError, match="triton: w is torch.float64, the kernels take fp32, bf16 and fp16"):
            nf4_quantize(torch.ones(64, dtype=torch.float64))


TILES = 2**20 + 3  # whole tiles before the one that runs: its first element lies beyond 2^32, or 2^31 where a tile is 2048


@pytest.mark.parametrize("op", ["nf4_quantize", "nf4_dequantize", "blockwise8_quantize", "blockwise8_dequantize"])
def test_indices_beyond_32_bits(op):
    """One program of a grid of a million, by writing its number in the place of %ctaid.x and moving every base to where its part
    of the tensors then lies."""
    tile = 4096 if op == "nf4_dequantize" else 2048
    w, packed = row_scaled(tile, dtype=torch.bfloat16), torch.randint(0, 256, (tile // 2,), dtype=torch.uint8)
    codes, absmax, scale = torch.randint(0, 256, (tile,), dtype=torch.uint8), row_scaled(tile // 64), row_scaled(1)
    nested = torch.randint(0, 256, (tile // 64,), dtype=torch.uint8)
    call = {
        "nf4_quantize": lambda: nf4_quantize(w),
        "nf4_dequantize": lambda: nf4_dequantize(packed, nested, scale, torch.tensor(0.5), (tile,), dtype=torch.bfloat16),
        "blockwise8_quantize": lambda: blockwise8_quantize(w, 64),
        "blockwise8_dequantize": lambda: blockwise8_dequantize(codes, absmax, 64, torch.bfloat16),
    }[op]
    per_tile = {
        "w": 2 * tile, "x": 2 * tile, "out": 2 * tile, "packed": tile // 2, "codes": tile,
        "absmax": tile // 64 * (1 if op == "nf4_dequantize" else 4), "absmax_scale": tile // 64 / 256 * 4,
    }  # fmt: skip
    (launch,) = launched(call)
    made = triton_aot.compiled(launch.kernel, 80, launch.arguments, launch.options)
    ptx, reads = re.subn(r"%ctaid\.x;", f"{TILES};", made.asm["ptx"])
    assert reads == 1
    names, arguments = launch.kernel.arg_names, list(launch.arguments)
    arguments[names.index("count")] = (TILES + 1) * tile
    if "whole_tiles" in names:
        arguments[names.index("whole_tiles")] = TILES + 1
    memory, there = Memory(), []
    for name, value in zip(names, arguments, strict=False):
        if isinstance(value, torch.Tensor):
            memory.allow(value.data_ptr(), value.numel() * value.element_size(), name)
            moved = int(TILES * per_tile.get(name, 0)) // value.element_size() * value.element_size()
            value = Moved(value.data_ptr() - moved)
        there.append(value)
    signature = triton_aot.specialisation(launch.kernel, 80, launch.arguments, launch.options)[0]
    parameters = laid_out(signature, there, declared(ptx, made.metadata.name))
    Program(ptx).run(made.metadata.name, (1, 1, 1), (128, 1, 1), made.metadata.shared, parameters, memory)
    with peftk.use("reference"):
        expected = call()
    outputs = {"nf4_quantize": ("packed", "absmax"), "blockwise8_quantize": ("codes", "absmax")}.get(op, ("out",))
    for name, right in zip(outputs, [expected] if isinstance(expected, torch.Tensor) else expected, strict=True):
        assert_same(launch.arguments[names.index(name)], right)


class Moved:
    """An address in the place of a tensor."""

    def __init__(self, address: int):
        self.address = address

    def data_ptr(self) -> int:
        return self.address % 2**64


def test_an_access_outside_a_tensor_is_a_fault():
    packed = torch.zeros(64, dtype=torch.uint8)
    (launch,) = launched(lambda: nf4_dequantize(packed, torch.ones(2), None, None, (128,)))
    arguments = list(launch.arguments)
    position = launch.kernel.arg_names.index("out")
    arguments[position] = arguments[position][:127]
    with pytest.raises(OutOfBounds, match="st.global"):
        PtxDoor().launch(launch.kernel, launch.grid, *arguments, **launch.options)


def test_triton_is_imported_where_it_is_used():
    command = "import sys, peftk; assert 'triton' not in sys.modules; print(peftk.info())"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_error_says_so():
    with peftk.use("triton"), pytest.raises(RuntimeError, match=r"nf4_quantize can't run: triton: torch \S+ sees no GPU"):
        nf4_quantize(torch.ones(64))


def test_an_old_triton_is_a_reason(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.TritonDoor().why_not() == ""
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    assert gpu.TritonDoor().why_not() == "triton is 3.3.1, the kernels need 3.4"
