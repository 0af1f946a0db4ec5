"""The host build of the CUDA kernels: the shim, held against kernels with known faults; the ops on it, also under sanitizers."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
import torch
from numerics import row_scaled

import peftk
from emulation.cuda_host import build
from emulation.cuda_host.door import HostDoor, PtxDoor, host_module
from peftk.format.code4 import CODES4
from peftk.ops import gpu

ROOT = Path(__file__).resolve().parents[2]
PLANTED = ROOT / "tests/emulation/cuda_host/planted.cpp"
FAULTS = ("none", "no barrier", "some return", "some skip", "overrun", "unwritten", "lane missing", "misaligned", "throw")

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=build.why_not() or "can be built")


@cache
def planted():
    return build.module([PLANTED], "planted")


def reverse(fault: str, seed: int = 0, blocks: int = 3, threads: int = 64) -> torch.Tensor:
    numbers = torch.arange(blocks * threads, dtype=torch.int32)
    out = torch.full_like(numbers, -1)
    planted().set_seed(seed)
    planted().reverse(numbers.data_ptr(), out.data_ptr(), blocks, threads, FAULTS.index(fault))
    return out.view(blocks, threads)


def test_blocks_and_barriers():
    expected = torch.arange(3 * 64, dtype=torch.int32).view(3, 64).flip(1)
    for seed in range(5):
        assert torch.equal(reverse("none", seed), expected)


def test_a_missing_barrier_shows():
    """Whoever runs too early reads the poison that shared memory starts with, and another seed gives another result."""
    results = [reverse("no barrier", seed) for seed in range(4)]
    poison = torch.tensor([0xA5] * 4, dtype=torch.uint8).view(torch.int32)
    assert all((r == poison).any() for r in results) and not torch.equal(results[0], results[1])


def test_shared_memory_is_poisoned_for_each_block():
    out = reverse("unwritten")
    assert (out[:, 64 - 1 - 7] == torch.tensor([0xA5] * 4, dtype=torch.uint8).view(torch.int32)).all()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("some return", r"reverse.*: deadlock in block \(\d, 0, 0\): 63 threads wait at __syncthreads, 1 have returned"),
        ("some skip", r"deadlock in block .*: 32 threads wait at __syncthreads, 32 have returned"),
        ("misaligned", "a misaligned access of 16 bytes"),
        ("throw", "reverse.*thrown by a thread"),
    ],
)
def test_faults_are_errors_that_name_the_kernel(fault, message):
    with pytest.raises(RuntimeError, match=message):
        reverse(fault)
    assert torch.equal(reverse("none")[0], torch.arange(63, -1, -1, dtype=torch.int32))  # and the next launch is a fresh one


def test_a_configuration_that_no_gpu_takes():
    with pytest.raises(RuntimeError, match=r"reverse.*invalid configuration: blocks \(1, 1, 1\), threads \(1025, 1, 1\)"):
        reverse("none", blocks=1, threads=1025)


def test_warps_exchange():
    numbers = torch.randint(0, 100, (96,), dtype=torch.int32)
    numbers[32:64] *= 2
    for seed in range(3):
        out = torch.full((99,), -1, dtype=torch.int32)
        planted().set_seed(seed)
        planted().warp_sums(numbers.data_ptr(), out.data_ptr(), 96, 0)
        sums = numbers.view(3, 32).sum(1)
        assert out[:96].view(3, 32).tolist() == [[s + 1000 * (i == 1)] * 32 for i, s in enumerate(sums.tolist())]
        votes = [sum((n % 2) << lane for lane, n in enumerate(row)) for row in numbers.view(3, 32).tolist()]
        assert [v & 0xFFFFFFFF for v in out[96:].tolist()] == votes


def test_a_lane_that_never_comes():
    numbers, out = torch.zeros(32, dtype=torch.int32), torch.zeros(40, dtype=torch.int32)
    with pytest.raises(
        RuntimeError, match=r"warp_sums.*: deadlock .* 31 threads wait at shfl.xor of lanes 4294967295, 1 have returned"
    ):
        planted().warp_sums(numbers.data_ptr(), out.data_ptr(), 32, FAULTS.index("lane missing"))


def test_atomics():
    total = torch.tensor([0, -1], dtype=torch.int32)
    planted().count(total.data_ptr(), total.data_ptr() + 4, 5, 70)
    assert total.tolist() == [350, 349]


def test_the_order_is_drawn_from_the_seed():
    orders = []
    for seed in (0, 1, 2, 0):
        at = torch.full((25,), 0, dtype=torch.int32)
        planted().set_seed(seed)
        planted().order(at.data_ptr(), at.data_ptr() + 4)
        orders.append(at[1:].tolist())
        assert sorted(orders[-1]) == list(range(24))
        assert all(len({n // 6 for n in orders[-1][i : i + 6]}) == 1 for i in range(0, 24, 6))  # one block after another
    assert orders[0] == orders[3] and orders[0] != orders[1] != orders[2] and orders[0] != list(range(24))


def test_conversions_are_torchs():
    """fp32 numbers where rounding turns: each exponent with significands that are ties, and their neighbours."""
    significands = [0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x7FF000, 0x7FFFFF, 0x400001]
    bits = [s << 31 | e << 23 | m for s in (0, 1) for e in range(256) for m in significands]
    x = torch.tensor([b - (1 << 32) if b >> 31 else b for b in bits], dtype=torch.int32).view(torch.float32)
    for dtype, is_bf16 in ((torch.bfloat16, True), (torch.float16, False)):
        got = torch.tensor([planted().round(b, is_bf16) for b in bits], dtype=torch.int32).to(torch.int16).view(dtype)
        expected = x.to(dtype)
        assert torch.equal(got.isnan(), expected.isnan())
        kept = ~expected.isnan()
        assert torch.equal(got[kept].view(torch.int16), expected[kept].view(torch.int16))
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    back = torch.tensor([planted().from_half(b & 0xFFFF) for b in range(-(2**15), 2**15)])
    assert torch.equal(back.nan_to_num(nan=1.5), halves.float().nan_to_num(nan=1.5))


def test_fma_that_rounds_down():
    for a, b, c in ((-1e-30, 16.0, 65553.0), (1e-30, 16.0, 65553.0), (0.3, 16.0, 65553.0), (-0.3, 16.0, 65553.0)):
        a, b, c = (torch.tensor(v).item() for v in (a, b, c))
        exact, got = Fraction(a) * Fraction(b) + Fraction(c), planted().fma_down(a, b, c)
        after = torch.nextafter(torch.tensor(got), torch.tensor(torch.inf)).item()
        assert Fraction(got) <= exact < Fraction(after)


def test_byte_perm():
    assert planted().byte_perm(0x33221100, 0x77665544, 0x6504) == 0x66554400 & 0xFF000000 | 0x00550044 | 0x6600_0000
    assert planted().byte_perm(0x33221100, 0x77665544, 0x0123) == 0x00112233


@pytest.fixture(params=["cuda-host", "cuda-ptx"])
def cuda(request: pytest.FixtureRequest):
    """A door to the ops' launchers; what it leads to stands in the test's name."""
    door = {"cuda-host": HostDoor, "cuda-ptx": PtxDoor}[request.param]()
    if why := door.why_not():
        pytest.skip(why)
    with gpu.through("cuda", door):
        yield door


@pytest.mark.parametrize("multiprocessors", [1, 3, 200])
def test_results_do_not_depend_on_the_grid_or_the_order(multiprocessors):
    w = row_scaled(37, 1000, dtype=torch.bfloat16)
    with peftk.use("reference"):
        expected = peftk.quantize_nf4(w)
        dense = expected.dequantize()
    host_module().set_multiprocessors(multiprocessors)
    try:
        for seed in (1, 2):
            with gpu.through("cuda", HostDoor(seed)), peftk.use("cuda"):
                got = peftk.quantize_nf4(w)
                assert all(torch.equal(a, b) for a, b in zip(got.tensors(), expected.tensors(), strict=True))
                assert torch.equal(got.dequantize(), dense)
    finally:
        host_module().set_multiprocessors(2)


@pytest.fixture
def one_multiprocessor():
    """Few thread blocks, so that each has many rounds to go."""
    host_module().set_multiprocessors(1)
    yield
    host_module().set_multiprocessors(2)


@pytest.mark.parametrize("block_size", [4096, 2048])
def test_rounds_of_large_blocks_keep_apart(cuda, one_multiprocessor, block_size):
    """A round's maxima go through shared memory that the next round writes again."""
    w = row_scaled(24, 4096)
    for quantize in (peftk.ops.nf4_quantize, peftk.ops.blockwise8_quantize):
        with peftk.use("reference"):
            expected = quantize(w, block_size)
        with peftk.use("cuda"):
            got = quantize(w, block_size)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("block_size", [32, 64, 256, 4096, 48])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_range_of_elements_is_dequantised(cuda, block_size, dtype):
    """From an odd element, inside a block, at a tile's edge; 48: a block size that is no power of two."""
    count = 3 * 4096 + 101
    packed = torch.randint(0, 256, ((count + 1) // 2,), dtype=torch.uint8)
    absmax = torch.rand(-(-count // block_size)) + 0.1
    with peftk.use("reference"):
        codes = torch.stack([packed >> 4, packed & 15], 1).view(-1)[:count].int()
        expected = torch.tensor(peftk.format.code4.NF4.values)[codes] * absmax.repeat_interleave(block_size)[:count]
    ranges = ((0, count), (1, 1), (63, 2), (block_size, 4096), (4096, 4096 + 7), (33, 4100), (4160, 8192), (count - 1, 1), (5, 0))
    for first, length in ranges:
        out = torch.full((length + 16,), -7.0, dtype=dtype)
        number = {torch.float32: 0, torch.bfloat16: 1}[dtype]
        cuda.call("nf4_dequantize", packed, absmax, None, None, first, length, block_size, 0, out[8:], number)
        assert torch.equal(out[8:-8], expected[first : first + length].to(dtype)), (first, length)
        assert (out[:8] == -7).all() and (out[-8:] == -7).all()


def bits(t: torch.Tensor) -> torch.Tensor:
    """As integers, one for all NaN."""
    t = torch.where(t.isnan(), torch.tensor(12345.0, dtype=t.dtype), t)
    return t.view({4: torch.int32, 2: torch.int16}[t.element_size()])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_code_at_every_constant_bit_for_bit(cuda, quant_type, dtype):
    """Products that round to zero, denormals, overflow; signs of zeros count. A tile has one kind of constant."""
    tiny, usual = (1e-45, -1e-45, 1e-42, 1e-40, 3e-39, 2.0**-101, 2.0**-99), (6e-8, 1e-5, 0.0, -0.0, -3.0)
    absmax = torch.tensor([*tiny, *usual, 7e4, 3.3e38, torch.inf, torch.nan]).repeat_interleave(32)
    packed = torch.randint(0, 256, (len(absmax) * 32,), dtype=torch.uint8)
    results = []
    for name in ("reference", "cuda"):
        with peftk.use(name):
            results.append(peftk.ops.nf4_dequantize(packed, absmax, None, None, (len(absmax), 64), 64, quant_type, dtype))
    assert torch.equal(bits(results[0]), bits(results[1]))
    codes, scale = packed[: len(absmax) * 16], absmax[: len(absmax) // 2]
    results = []
    for name in ("reference", "cuda"):
        with peftk.use(name):
            results.append(peftk.ops.blockwise8_dequantize(codes, scale, 32, dtype))
    assert torch.equal(bits(results[0]), bits(results[1]))


def test_indices_beyond_32_bits(cuda):
    """Elements around 2^31 and 2^32 of a weight whose codes and constants lie in sparse mappings, so that they fit memory."""
    count = 2**32 + 8192
    packed = torch.frombuffer(mmap.mmap(-1, count // 2), dtype=torch.uint8)
    absmax = torch.frombuffer(mmap.mmap(-1, count // 16), dtype=torch.float32)
    for first in (2**31 - 2048, 2**31, 2**32 + 4096):
        packed[first // 2 : first // 2 + 1024] = 0xF0
        absmax[first // 64 : first // 64 + 32] = torch.arange(32) + 1.0
        out = torch.empty(2048)
        cuda.call("nf4_dequantize", packed, absmax, None, None, first, 2048, 64, 0, out, 0)
        assert torch.equal(out.view(32, 64), torch.tensor([1.0, -1.0]).repeat(32) * (torch.arange(32)[:, None] + 1.0))


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_unaligned_memory(cuda, offset):
    """Views that start anywhere: inputs and outputs of every op."""
    w = torch.cat([torch.zeros(offset), row_scaled(40, 256).view(-1)])[offset:]
    expected = {}
    for name in ("reference", "cuda"):
        with peftk.use(name):
            packed, absmax = peftk.ops.nf4_quantize(w)
            shifted = torch.cat([packed.new_zeros(offset), packed])[offset:]
            dense = peftk.ops.nf4_dequantize(shifted, absmax, None, None, w.shape, dtype=torch.float16)
            codes, scale = peftk.ops.blockwise8_quantize(w)
            shifted = torch.cat([codes.new_zeros(offset), codes])[offset:]
            back = peftk.ops.blockwise8_dequantize(shifted, scale, dtype=torch.bfloat16)
            results = (packed, absmax, dense, codes, scale, back)
        assert all(torch.equal(a, b) for a, b in zip(results, expected.setdefault("first", results), strict=True))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [64, 128])
def test_ties_in_whole_blocks(cuda, quant_type, block_size):
    """Each threshold and the fp32 numbers beside it, zeros of both signs, ends: in blocks that the main path takes."""
    t = torch.tensor(CODES4[quant_type].thresholds)
    below, above = torch.nextafter(t, torch.tensor(-2.0)), torch.nextafter(t, torch.tensor(2.0))
    w = torch.cat([t, below, above, torch.tensor([1.0, -1.0, 0.0, -0.0, 1e-45, -1e-45, 0.0625, -0.0625, 0.5])])
    w = torch.cat([w, torch.rand(block_size - len(w)) * 2 - 1]) * torch.exp2(torch.arange(-60, 60))[:, None]
    with peftk.use("reference"):
        expected = peftk.ops.nf4_quantize(w, block_size, quant_type)
    with peftk.use("cuda"):
        got = peftk.ops.nf4_quantize(w, block_size, quant_type)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("scale", [1e-45, 1e-39, 1e-30, 3e38])
def test_the_ends_of_fp32(cuda, quant_type, scale):
    """Absmax whose reciprocal is infinite or denormal; blocks with one NaN or Inf; signs of zeros: bit for bit."""
    w = (torch.randn(40, 128).clamp(-1, 1) * scale).contiguous()
    w[3, 5], w[4, 6], w[5], w[6, ::2] = float("nan"), float("-inf"), 0, -0.0
    results = []
    for name in ("reference", "cuda"):
        with peftk.use(name):
            packed, absmax = peftk.ops.nf4_quantize(w, 128, quant_type)
            dense = peftk.ops.nf4_dequantize(packed, absmax, None, None, w.shape, 128, quant_type)
            codes, constants = peftk.ops.blockwise8_quantize(w, 128)
            back = peftk.ops.blockwise8_dequantize(codes, constants, 128)
            results.append((packed, absmax, dense, codes, constants, back))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(*(bits(t) if t.is_floating_point() else t for t in (ours, theirs)))


def test_every_byte_moves_once_and_128_bits_at_a_time():
    """Counted while nvcc's PTX runs: w is read once and wide, W written once and wide, codes and constants once."""
    door, w = PtxDoor(), row_scaled(64, 2048, dtype=torch.bfloat16)
    if why := door.why_not():
        pytest.skip(why)
    with gpu.through("cuda", door), peftk.use("cuda"):
        packed, absmax = peftk.ops.nf4_quantize(w)
        (kernel, report), *others = door.reports
        assert "nf4_quantize_kernel" in kernel and not others
        assert report.accesses["global", "load", 16] * 16 == w.nbytes
        assert report.bytes_stored["global"] == packed.nbytes + absmax.nbytes
        out = peftk.ops.nf4_dequantize(packed, absmax, None, None, w.shape, dtype=torch.bfloat16)
        (kernel, report), *others = door.reports
        assert "nf4_dequantize_kernel" in kernel and not others
        assert report.bytes_stored["global"] == out.nbytes and report.wide_share("global", "store") == 1
        codes, absmax = peftk.ops.blockwise8_quantize(w)
        (kernel, report), *others = door.reports
        assert report.accesses["global", "load", 16] * 16 == w.nbytes
        assert report.bytes_stored["global"] == codes.nbytes + absmax.nbytes
        out = peftk.ops.blockwise8_dequantize(codes, absmax, dtype=torch.bfloat16)
        (kernel, report), *others = door.reports
        assert report.bytes_stored["global"] == out.nbytes and report.wide_share("global", "store") == 1


def sanitized(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """python under AddressSanitizer and UBSan, which must be loaded before all else."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    options = {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PEFTK_CUDA_HOST_SANITIZE": "1",
    }
    command, environment = [sys.executable, *arguments], {**os.environ, **options, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, env=environment)


# Every op, dtype, code and block size; ragged, tiny and unaligned.
COVERING = (
    "cuda-host and (test_block_sizes or test_dtypes or test_every_value or test_unaligned_memory or test_the_ends_of_fp32 or "
    "test_any_range or test_every_code or test_ties or test_equals_the_definition and 33 or test_equals_the_table and 1030)"
)


def test_the_ops_under_sanitizers():
    build.built([*build.op_sources(), *build.SHIM], "cuda_host", sanitize=True)  # here: a compiler is slow under sanitizers
    ops = [f"tests/ops/test_{op}.py" for op in ("nf4_quantize", "nf4_dequantize", "blockwise8_quantize", "blockwise8_dequantize")]
    done = sanitized("-m", "pytest", "-q", "-k", COVERING, *ops, "tests/emulation/test_cuda_host.py")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("fault", ["none", "overrun"])
def test_sanitizers_see_what_lies_beyond_shared_memory(fault):
    code = f"""
import array, sys
sys.path[:0] = ["tests", "."]
from emulation.cuda_host import build
planted = build.module([build.HERE / "planted.cpp"], "planted", sanitize=True)
numbers, out = array.array("i", range(64)), array.array("i", [0] * 64)
planted.reverse(numbers.buffer_info()[0], out.buffer_info()[0], 1, 64, {FAULTS.index(fault)})
print("ran", list(out) == list(numbers)[::-1])
"""
    build.built([PLANTED, *build.SHIM], "planted", sanitize=True)
    done = sanitized("-c", code)
    if fault == "none":
        assert done.stdout.strip() == "ran True", done.stderr[-3000:]
    else:
        assert "ran" not in done.stdout and "AddressSanitizer: heap-buffer-overflow" in done.stderr and "reverse" in done.stderr
