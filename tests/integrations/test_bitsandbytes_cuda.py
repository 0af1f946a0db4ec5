"""bitsandbytes' GPU kernels replaced: by the host build of ours on CPU tensors, sent to the ops' CUDA kernels by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emulation.doors import door
from numerics import row_scaled

import peftk
from peftk.integrations import bitsandbytes as backend
from peftk.integrations.bitsandbytes import entry, on_cuda
from peftk.native import native, why_not_native
from peftk.ops import gpu

NAMES = [f"torch.ops.bitsandbytes.{op} (CUDA)" for op in on_cuda.OPS]
Kernel = Callable[..., Any]


def kernel(op: str) -> Kernel:
    """The op's CUDA kernel, whatever device the tensors are on."""
    name, _, overload = op.partition(".")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return lambda *arguments, **named: getattr(getattr(torch.ops.bitsandbytes, name), overload or "default").redispatch(
        keys, *arguments, **named
    )


@pytest.fixture
def theirs() -> Iterator[None]:
    """bitsandbytes as it is with a GPU: with CUDA kernels, which here only say whose they are."""
    pytest.importorskip("bitsandbytes")
    if native() is None:
        pytest.skip(why_not_native())
    library = torch.library.Library("bitsandbytes", "IMPL")

    def own(*arguments: Any, **named: Any) -> None:
        raise NotImplementedError("bitsandbytes' own")

    for op in on_cuda.OPS:
        library.impl(op, own, "CUDA")
    yield
    backend.disable()
    library._destroy()


def in_force(name: str) -> bool:
    """Whether ours stands before bitsandbytes' kernel."""
    try:
        kernel("quantize_4bit")(torch.randn(64), 64, name, torch.uint8)
    except NotImplementedError:
        return False
    return True


FORMATS = [("nf4", torch.float32), ("nf4", torch.bfloat16), ("nf4", torch.float16), ("fp4", torch.float32)]


@pytest.mark.parametrize(("quant_type", "dtype"), FORMATS)
@pytest.mark.parametrize("name", ["cuda-host", "cuda-ptx"])
def test_equal_to_bitsandbytes(theirs, name: str, quant_type: str, dtype: torch.dtype):
    """To its own functions on a CPU where these are right: no ragged block, none of zeros, no FP4 of 16 bits, which it rounds to
    the wrong neighbour. FP4 has two codes for zero: its CPU function takes either, its CUDA kernel and ours by the sign."""
    import bitsandbytes as bnb

    if reason := door(name).why_not():
        pytest.skip(reason)
    w = row_scaled(6, 128).to(dtype)
    packed, state = bnb.functional.quantize_4bit(w, quant_type=quant_type, blocksize=64)
    values = bnb.functional.dequantize_4bit(packed, state)
    with gpu.through("cuda", door(name)), peftk.use("cuda"):
        backend.enable(cuda=True)
        assert [n for n in peftk.info().replaced["bitsandbytes"] if n.endswith("(CUDA)")] == NAMES
        got, absmax = kernel("quantize_4bit")(w, 64, quant_type, torch.uint8)
        assert quant_type == "fp4" or torch.equal(got, packed)
        assert torch.equal(absmax, state.absmax)
        others, _ = kernel("quantize_4bit")(w, 64, quant_type, torch.bfloat16)
        assert others.dtype == torch.bfloat16 and torch.equal(others.view(torch.uint8).view(-1), got.view(-1))
        arguments = (got, absmax, 64, quant_type, w.shape, dtype)
        assert torch.equal(kernel("dequantize_4bit")(*arguments), values)
        out = torch.empty(w.shape, dtype=dtype)
        kernel("dequantize_4bit.out")(*arguments, out=out)
        assert torch.equal(out, values)


@pytest.mark.parametrize(("quant_type", "dtype"), [*FORMATS, ("fp4", torch.bfloat16), ("fp4", torch.float16)])
@pytest.mark.parametrize("block_size", [32, 4096])
def test_ragged_blocks_and_zeros(theirs, block_size: int, quant_type: str, dtype: torch.dtype):
    """As ours on a CPU, bit for bit."""
    if reason := door("cuda-host").why_not():
        pytest.skip(reason)
    w = row_scaled(9, 1031).to(dtype)
    w[3:6] = 0
    packed, absmax = peftk.ops.nf4_quantize(w, block_size, quant_type)
    values = peftk.ops.nf4_dequantize(packed, absmax, None, None, w.shape, block_size, quant_type, dtype)
    with gpu.through("cuda", door("cuda-host")), peftk.use("cuda"):
        backend.enable(cuda=True)
        got, scales = kernel("quantize_4bit")(w, block_size, quant_type, torch.uint8)
        assert torch.equal(got.view(-1), packed) and torch.equal(scales, absmax)
        back = kernel("dequantize_4bit")(got, scales, block_size, quant_type, w.shape, dtype)
    assert torch.equal(back.view(torch.uint8), values.view(torch.uint8))


def test_putting_back(theirs):
    if reason := door("cuda-host").why_not():
        pytest.skip(reason)
    with gpu.through("cuda", door("cuda-host")), peftk.use("cuda"):
        assert not in_force("nf4")
        backend.enable(cuda=True)
        assert in_force("nf4")
        backend.disable()
        assert not in_force("nf4") and peftk.info().left == {}


def test_not_unless_asked_for(theirs):
    backend.enable()
    assert not in_force("nf4") and peftk.info().left == {}
    assert not any(name.endswith("(CUDA)") for name in peftk.info().replaced["bitsandbytes"])


def test_what_stays_says_why(theirs, monkeypatch: pytest.MonkeyPatch):
    """A build without nvcc; a GPU that is too old; a bitsandbytes without the kernel."""
    left = []
    old = gpu.GpuModel("Quadro P6000", (6, 1), 30)

    def refused(**facts: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "cuda", lambda: facts.get("door", type("Door", (), {"why_not": lambda self: ""})()))
            patch.setattr(torch.cuda, "device_count", lambda: facts.get("devices", 0))
            patch.setattr(gpu, "model_of", lambda index: old)
            patch.setattr(on_cuda, "is_defined", lambda op: facts.get("defined", True))
            backend.enable(cuda=True)
            assert list(peftk.info().left["bitsandbytes"]) == NAMES and not in_force("nf4")
            (reason,) = set(peftk.info().left["bitsandbytes"].values())
            assert all(f"  {name}: {reason}" in str(peftk.info()).splitlines() for name in NAMES)
            left.append(reason)
            backend.disable()

    refused(door=type("Door", (), {"why_not": lambda self: "this build found no nvcc"})())
    refused(devices=1)
    refused(defined=False)
    assert left == [
        "this build found no nvcc",
        "Quadro P6000 has compute capability 6.1, the kernels need 7.5",
        "bitsandbytes has no such kernel here",
    ]


def test_the_switch(theirs, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(backend, "enable", lambda cuda: asked.append(cuda))
    for value in ("1", "cuda", "0"):
        monkeypatch.setenv(entry.SWITCH, value)
        entry.register()
    assert asked == [False, True]
