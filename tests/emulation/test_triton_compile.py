"""Every Triton kernel compiles for every target, ahead of time, and what comes out rounds as the reference does."""

from __future__ import annotations

import re

import pytest
import torch

from bench.static import triton_aot
from bench.static.launches import Launch, launched
from peftk.ops import blockwise8_dequantize, blockwise8_quantize, nf4_dequantize, nf4_quantize

if triton_aot.why_not():
    pytest.skip(triton_aot.why_not(), allow_module_level=True)


TARGETS = (*triton_aot.CUDA_TARGETS, *triton_aot.HIP_TARGETS)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COUNT = 8192


def shifted(make, *shape, dtype, aligned=True):
    """A contiguous tensor on 16 bytes, or one element behind."""
    (count,) = shape
    return make(count, dtype=dtype) if aligned else make(count + 1, dtype=dtype)[1:]


def launch(op: str, dtype: str = "bf16", block_size: int = 64, nested: bool = True, code: str = "nf4", aligned=True) -> Launch:
    """The one launch of an op with these facts."""
    kind, blocks = DTYPES[dtype], -(-COUNT // block_size)
    floats, codes = (shifted(torch.zeros, COUNT, dtype=d, aligned=aligned) for d in (kind, torch.uint8))
    packed = shifted(torch.zeros, COUNT // 2, dtype=torch.uint8, aligned=aligned)
    nesting = (torch.zeros(-(-blocks // 256)), torch.zeros(())) if nested else (None, None)
    absmax = torch.zeros(blocks, dtype=torch.uint8 if nested else torch.float32)
    (made,) = launched(
        {
            "nf4_quantize": lambda: nf4_quantize(floats, block_size, code),
            "nf4_dequantize": lambda: nf4_dequantize(packed, absmax, *nesting, (COUNT,), block_size, code, out=floats),
            "blockwise8_quantize": lambda: blockwise8_quantize(floats, block_size, True),
            "blockwise8_dequantize": lambda: blockwise8_dequantize(codes, torch.zeros(blocks), block_size, kind, True),
        }[op]
    )
    return made


OPS = ("nf4_quantize", "nf4_dequantize", "blockwise8_quantize", "blockwise8_dequantize")
USUAL = [(op, {"block_size": 64 if op.startswith("nf4") else 256}, target) for op in OPS for target in TARGETS]
RARE = [
    ("nf4_dequantize", {"dtype": "fp32", "block_size": 4096}, 75),
    ("nf4_dequantize", {"dtype": "fp16", "nested": False, "block_size": 32}, 90),
    ("nf4_dequantize", {"block_size": 96}, 100),
    ("nf4_dequantize", {"aligned": False}, 120),
    ("nf4_quantize", {"dtype": "fp32", "block_size": 4096, "code": "fp4"}, "gfx1100"),
    ("blockwise8_quantize", {"dtype": "fp32", "block_size": 7}, 75),
    ("blockwise8_dequantize", {"dtype": "fp32", "block_size": 7}, "gfx942"),
]
WHOLE = [
    (op, {"dtype": dtype, "block_size": size, "nested": nested, "code": code, "aligned": aligned}, target)
    for op in OPS
    for dtype in DTYPES
    for size in ((32, 64, 4096) if op.startswith("nf4") else (7, 64, 256, 4096))
    for nested in ((True, False) if op == "nf4_dequantize" else (True,))
    for code in (("nf4", "fp4") if op == "nf4_quantize" else ("nf4",))
    for aligned in ((True, False) if size in (7, 64) else (True,))
    for target in TARGETS
]


def check(op: str, facts: dict, target: int | str) -> None:
    """Compiles, and no product runs into a sum, no quotient is approximate, no denormal is flushed."""
    one = launch(op, **facts)
    made = triton_aot.compiled(one.kernel, target, one.arguments, one.options)
    if isinstance(target, str):
        assert made.asm["hsaco"]
        if not op.endswith("_quantize"):  # AMD's correctly rounded quotient is made of them
            assert not re.findall(r"v_\w*(?:fma|mad|mac)\w*_f32", made.asm["amdgcn"])
    else:
        assert made.asm["cubin"]
        assert not re.findall(r"\bfma\.|\bmad\.\w*\.?f|div\.(?:full|approx)|rcp\.|\.ftz", made.asm["ptx"])


@pytest.mark.parametrize(("op", "facts", "target"), USUAL + RARE, ids=str)
def test_compiles(op, facts, target):
    check(op, facts, target)


@pytest.mark.full
@pytest.mark.parametrize(("op", "facts", "target"), WHOLE, ids=str)
def test_everything_compiles(op, facts, target):
    check(op, facts, target)


def test_whole_tiles_move_sixteen_bytes_whatever_the_count():
    one = launch("nf4_dequantize")
    for ragged in (one.arguments, (*one.arguments[:7], COUNT - 3, 1)):
        ptx = triton_aot.compiled(one.kernel, 80, ragged, one.options).asm["ptx"]
        assert re.search(r"st\.global\.cs\.v4\.b32", ptx) and re.search(r"ld\.global\.v4\.b32", ptx)


def test_a_launch_is_specialised_as_tritons_launcher_does():
    one = launch("nf4_dequantize", nested=False, aligned=False)
    signature, constants, attributes, options = triton_aot.specialisation(one.kernel, 80, one.arguments, one.options)
    names = one.kernel.arg_names
    assert {n: signature[n] for n in ("packed", "absmax", "absmax_scale", "out", "count", "TILE")} == {
        "packed": "*u8", "absmax": "*fp32", "absmax_scale": "constexpr", "out": "*bf16", "count": "i64", "TILE": "constexpr",
    }  # fmt: skip
    assert constants[(names.index("absmax_scale"),)] is None and constants[(names.index("BLOCK_SIZE"),)] == 64
    aligned = {names[position[0]] for position, facts in attributes.items() if facts}
    assert aligned == {"absmax", "values4"}  # packed and out begin one element behind; count is left open
    assert options["enable_fp_fusion"] is False and options["num_warps"] == 4
