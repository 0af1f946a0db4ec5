"""peftk.ops.explain: what it says is what a call does."""

from __future__ import annotations

import pytest
import torch

import peftk
from peftk.native import native
from peftk.ops import choices, dispatch, gpu
from peftk.ops.gpu import GpuModel

OPS = sorted(choices.CALLS)


class Door:
    """A GPU of that name, as far as a choice goes."""

    def __init__(self, name: str, capability: tuple[int, int], multiprocessors: int):
        self.facts = GpuModel(name, capability, multiprocessors)

    def reasons_against(self, *tensors):
        return [f"a tensor is on {t}" for t in map(dispatch.device_type, filter(lambda t: t is not None, tensors)) if t != "cuda"]

    def model(self, device):
        return self.facts


A100 = Door("NVIDIA A100-SXM4-80GB", (8, 0), 108)


def test_every_op_can_be_explained():
    assert set(choices.CALLS) == set(peftk.ops.__all__) - {"quantize_nf4", "explain"}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", choices.DEVICES)
def test_every_op_on_every_device(op, device):
    explained = peftk.ops.explain(op, m=3, n=32, k=64, device=device)
    assert explained.choices[0].op == op and not dispatch.is_asking()
    for choice in explained.choices:
        names = [one.name for one in choice.candidates]
        assert names[-1] == "reference" and set(names) <= set(dispatch.NAMES)
        assert choice.chosen == ("cpu" if device == "cpu" and native() else "reference")
        assert all(one.against for one in choice.candidates if one.name in ("cuda", "triton"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_call_does_what_was_said(monkeypatch, dtype):
    """fp64 has a reference only. A step forward and backward, chosen as explained."""
    explained = peftk.ops.explain("nf4_lora_linear", m=3, n=32, k=64, r=2, dtype=dtype)
    done = []

    def spy(op, table, *arguments):
        run = select(op, table, *arguments)
        if op.startswith("nf4_lora"):  # the reference calls other ops
            done.append((op, next(one.name for one in table if one.run is run)))
        return run

    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    w4 = peftk.quantize_nf4(torch.randn(32, 64))
    factors = torch.randn(2, 64, dtype=dtype), torch.randn(32, 2, dtype=dtype)
    select = dispatch.select
    monkeypatch.setattr(dispatch, "select", spy)
    peftk.ops.nf4_lora_linear(x, w4, *factors, 1.0).sum().backward()
    assert done == [(choice.op, choice.chosen) for choice in explained.choices] and len(done) == 2
    assert done[0][1] == ("cpu" if dtype == torch.bfloat16 and native() else "reference")


def test_reasons_are_those_of_the_call():
    shown = str(peftk.ops.explain("nf4_linear", n=32, k=64, dtype=torch.float64))
    assert "  reference  runs" in shown
    if native():
        assert "  cpu        no: x is torch.float64, the kernels take fp32, bf16 and fp16" in shown


def test_what_is_forced():
    with peftk.use("reference"):
        shown = str(peftk.ops.explain("nf4_dequantize", n=32, k=64))
    assert "  reference  runs" in shown and "no: peftk.use('reference') forces another" in shown
    with peftk.use("triton"):
        explained = peftk.ops.explain("lion_step", n=32, k=64)
    assert explained.choices[0].chosen is None and "nothing of these runs" in str(explained)


@pytest.mark.skipif(native() is None, reason="no native module")
def test_the_instruction_set_is_named():
    with peftk.use("cpu-scalar"):
        assert "  cpu        runs: scalar" in str(peftk.ops.explain("nf4_quantize", n=32, k=64))


@pytest.mark.parametrize(
    ("m", "forward", "backward"),
    [
        (1, "few, 8 rows of x a tile (regimes.csv, tensor from m = 0 on NVIDIA A100", "tile, 16 rows"),
        (64, "tile, 64 rows of x a tile", "tile, 64 rows"),
        (4096, "chunks, 20 MB a chunk", "chunks, 20 MB a chunk"),
    ],
)
@pytest.mark.parametrize("op", ["nf4_linear", "nf4_lora_linear"])
def test_the_kernel_of_a_gpu_is_named(op, m, forward, backward):
    with gpu.through("cuda", A100):
        lines = str(peftk.ops.explain(op, m=m, device="cuda")).splitlines()
    cuda = [line for line in lines if line.startswith("  cuda")]
    assert cuda[0].startswith(f"  cuda       runs: {forward}") and cuda[1].startswith(f"  cuda       runs: {backward}")


def test_odd_shapes_take_the_simple_kernel():
    with gpu.through("cuda", A100):
        shown = str(peftk.ops.explain("nf4_linear", m=4, n=32, k=100, device="cuda"))
    assert "runs: simple, 8 rows of x a tile (regimes.csv, plain from m = 0" in shown


def test_nothing_is_computed():
    """W of 2^36 elements."""
    assert peftk.ops.explain("nf4_lora_linear", m=1 << 20, n=1 << 18, k=1 << 18).choices


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"op": "matmul"}, "op: expected one of nf4_linear, .*, got 'matmul'"),
        ({"op": "nf4_linear", "device": "tpu"}, "device: expected one of cpu, cuda, got 'tpu'"),
        ({"op": "nf4_linear", "k": 0}, "k: expected 1 or more, got 0"),
        ({"op": "nf4_linear", "block_size": 48}, "block_size: expected one of .*, got 48"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        peftk.ops.explain(**arguments)
    assert not dispatch.is_asking()
