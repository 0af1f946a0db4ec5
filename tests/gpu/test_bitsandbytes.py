"""bitsandbytes' 4-bit ops on a GPU, its own kernels and then ours in their place: the same bytes and values."""

from __future__ import annotations

import itertools

import pytest
import torch

from gpu.bodies import SOME
from gpu.calls import DTYPES, Place, differing, weight
from peftk.format.code4 import BLOCK_SIZES, CODES4

pytestmark = pytest.mark.gpu


@pytest.fixture
def bnb():
    """The package, alone; ``enable`` takes over, and the end of the test gives back."""
    package = pytest.importorskip("bitsandbytes")
    from peftk.integrations import bitsandbytes as backend

    if reason := Place("cuda", "cuda").why_not("nf4_quantize"):
        pytest.skip(reason)
    yield package
    backend.disable()


def taken_over() -> None:
    from peftk.integrations import bitsandbytes as backend

    backend.enable(cuda=True)
    assert "torch.ops.bitsandbytes.quantize_4bit (CUDA)" in backend.held("bitsandbytes").names


def nonzero(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """No block of zeros, which have other codes there."""
    return weight(*shape, dtype=dtype).add_(1e-3).cuda()


def test_the_same_bytes_and_values(bnb):
    cases = list(itertools.product(CODES4, BLOCK_SIZES, DTYPES, ((64, 4096), (33, 129))))

    def results() -> list[tuple[torch.Tensor, ...]]:
        torch.manual_seed(0)
        made = []
        for quant_type, block_size, dtype, shape in cases:
            w = nonzero(*shape, dtype=dtype)
            packed, state = bnb.functional.quantize_4bit(w, blocksize=block_size, quant_type=quant_type)
            out = torch.empty_like(w)
            bnb.functional.dequantize_4bit(packed, state, out=out)
            made.append(tuple(t.cpu() for t in (packed, state.absmax, bnb.functional.dequantize_4bit(packed, state), out)))
        return made

    theirs = results()
    taken_over()
    for case, got, wanted in zip(cases, results(), theirs, strict=True):
        assert not (what := differing(got, wanted)), f"{case}: {what}"


def test_zeros(bnb):
    """Equal as numbers: theirs may be -0."""
    packed, state = bnb.functional.quantize_4bit(torch.zeros(4, 64, device="cuda"), quant_type="nf4")
    theirs = bnb.functional.dequantize_4bit(packed, state)
    taken_over()
    packed, state = bnb.functional.quantize_4bit(torch.zeros(4, 64, device="cuda"), quant_type="nf4")
    assert torch.equal(bnb.functional.dequantize_4bit(packed, state), theirs) and (packed == 0x77).all()


def test_quantising_on_a_side_stream(bnb):
    """bitsandbytes 0.50.2 launches on the default stream, before the weight has come."""
    taken_over()
    arriving, side = nonzero(512, 512, dtype=torch.bfloat16), torch.cuda.Stream()
    wanted, _ = bnb.functional.quantize_4bit(arriving, quant_type="nf4")
    w = torch.zeros_like(arriving)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SOME)
        w.copy_(arriving)
        packed, _ = bnb.functional.quantize_4bit(w, quant_type="nf4")
    side.synchronize()
    assert torch.equal(packed, wanted)
