"""What a CUDA graph's capture asks of the ops, as far as it shows without a GPU: nothing is waited for, memory is torch's own,
and every launch is on the stream that the door got. tests/gpu/test_device.py captures and replays on a real one."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu.calls import TYPICAL
from low_rank import SCALE, SEED
from numerics import row_scaled

import peftk
from emulation import doors
from peftk.ops import gpu, nf4_linear, nf4_lora_linear
from peftk.ops.adamw_step import adamw_step, adamw_step8
from peftk.ops.philox_dropout import philox_dropout

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# What waits for a GPU: a number that the CPU asks for, and a copy to or from it, which building a tensor from numbers is too.
WAITS = ("item", "tolist", "numpy", "cpu", "cuda", "nonzero", "__bool__", "__int__", "__float__", "__index__")
MAKES = ("tensor", "as_tensor", "from_numpy", "equal", "nonzero", "unique", "masked_select")
# Of the CUDA runtime: what starts a kernel, and questions that are answered without waiting, also within a capture.
ALLOWED = {
    "cudaDeviceGetAttribute",
    "cudaFuncGetName",
    "cudaFuncSetAttribute",
    "cudaGetDevice",
    "cudaGetDeviceCount",
    "cudaGetDeviceProperties",
    "cudaGetErrorString",
    "cudaLaunchKernel",
}


@contextlib.contextmanager
def capturing():
    """RuntimeError for what a capture would refuse."""

    def refuse(name: str) -> Callable[..., Any]:
        def refused(*arguments: Any, **options: Any) -> Any:
            raise RuntimeError(f"{name}: waits for the GPU, which a capture refuses")

        return refused

    with pytest.MonkeyPatch.context() as patch:
        for name in WAITS:
            patch.setattr(torch.Tensor, name, refuse(f"Tensor.{name}"))
        for name in MAKES:
            patch.setattr(torch, name, refuse(f"torch.{name}"))
        yield


def products(m: int, double_quant: bool) -> Callable[[], Any]:
    """Forward, and forward and backward with LoRA."""
    n, k, r = 18, 640, 8
    w4 = peftk.quantize_nf4(row_scaled(n, k), double_quant=double_quant)
    x, dy = torch.randn(m, k, dtype=torch.bfloat16), torch.randn(m, n, dtype=torch.bfloat16)
    tensors = (x.requires_grad_(), torch.randn(r, k).requires_grad_(), torch.randn(n, r).requires_grad_())

    def run() -> Any:
        with torch.no_grad():
            nf4_linear(tensors[0], w4)
        y = nf4_lora_linear(tensors[0], w4, *tensors[1:], SCALE, dropout=0.3, seed=SEED)
        return torch.autograd.grad(y, tensors, dy)

    return run


def step(bits: int) -> Callable[[], Any]:
    params = [torch.randn(300), torch.randn(5)]
    grads, hyper = [torch.randn_like(p) for p in params], {"step": 3, "lr": 1e-2}
    if bits == 32:
        moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        return lambda: adamw_step(params, grads, *moments, **hyper)
    codes = [[torch.zeros(p.shape, dtype=torch.uint8) for p in params] for _ in range(2)]
    absmax = [[torch.zeros(-(-p.numel() // 256)) for p in params] for _ in range(2)]
    return lambda: adamw_step8(params, grads, *codes, *absmax, **hyper)


def typical(op: str) -> Callable[[], Any]:
    call = TYPICAL[op]()
    return lambda: call.run(*call.tensors)


def dropout() -> Callable[[], Any]:
    x = torch.randn(9, 65)
    return lambda: philox_dropout(x, 0.3, SEED)


CALLS: dict[str, Callable[[], Callable[[], Any]]] = {
    **{op: partial(typical, op) for op in TYPICAL},
    **{f"products of {m} rows": partial(products, m, m != 5) for m in (1, 5, 20)},
    **{f"AdamW in {bits} bits": partial(step, bits) for bits in (32, 8)},
    "philox_dropout": dropout,
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_waited_for(name: str):
    """From the second call on: what is made at the first one is made outside of a capture."""
    if why := doors.why_not("cuda-host"):
        pytest.skip(why)
    with gpu.through("cuda", doors.door("cuda-host")), peftk.use("cuda"):
        run = CALLS[name]()
        run()
        with capturing():
            run()


@pytest.mark.parametrize(
    "planted",
    [
        lambda t: t.sum().item(),
        lambda t: bool(t.any()),
        lambda t: torch.tensor([1.0]),
        lambda t: t.cpu(),
        lambda t: torch.nonzero(t),
    ],
)
def test_waiting_is_seen(planted: Callable[[torch.Tensor], Any]):
    planted(torch.ones(3))
    with capturing(), pytest.raises(RuntimeError, match="waits for the GPU"):
        planted(torch.ones(3))


def test_c_plus_plus_allocates_nothing_and_waits_for_nothing():
    sources = [p for p in CSRC.rglob("*") if p.suffix in (".cu", ".cuh", ".h", ".cpp")]
    used = {name: path for path in sources for name in re.findall(r"\b(cuda[A-Z]\w*)\s*\(", path.read_text())}
    assert "cudaLaunchKernel" in used
    assert used.keys() <= ALLOWED, {name: str(path) for name, path in used.items() if name not in ALLOWED}
    assert not [path for path in sources if "<<<" in path.read_text()], (
        "launches go through csrc/cuda/launch.h, which takes a stream"
    )


def test_the_door_passes_the_current_stream(monkeypatch: pytest.MonkeyPatch):
    """Of the first tensor's device, asked for at each call, which a capture's own stream needs."""
    got, streams = [], iter((111, 222))
    monkeypatch.setattr(gpu, "native", lambda: SimpleNamespace(cuda_thing=lambda *arguments: got.append(arguments)))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=next(streams)))
    tensor = torch.ones(2)
    for _ in range(2):
        gpu.CudaDoor().call("thing", tensor, None, 7)
    assert got == [(tensor.data_ptr(), 0, 7, 111), (tensor.data_ptr(), 0, 7, 222)]
