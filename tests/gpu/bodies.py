"""What must hold on a GPU, as functions of an op and a place: test_device.py calls them there, test_bodies.py plants bugs for
them to find. ``cuda`` stands for torch.cuda."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import peftk
from bench.gpu.device import capture
from gpu.calls import EDGE, TYPICAL, Place, big, differing, matrix

SOME, LONG = 50_000_000, 1_000_000_000  # cycles: hundredths of a second, half a second
POWERS = (2**30, 2**31, 2**32)  # where bytes of bf16 and elements no longer fit 32 bits
POISONS = ((float("nan"), 0xA5), (-7.0, 0x5A))  # of floats, of bytes


def same_bits(op: str, place: Place) -> None:
    """Every result is that of the CPU kernels, bit for bit, for all dtypes, block sizes and ragged shapes."""
    for call in matrix(op):
        assert not (what := differing(place.run(call), call.expected())), f"{call.what}: {what}"


def same_every_time(op: str, place: Place, times: int = 10) -> None:
    """One input, one result."""
    call = TYPICAL[op]()
    tensors = place.move(call)
    first = tuple(result.cpu() for result in place.run(call, tensors))
    for _ in range(times - 1):
        assert not (what := differing(place.run(call, tensors), first)), what


def every_byte_is_written(op: str, place: Place) -> None:
    """Results don't depend on what memory held before."""
    call = TYPICAL[op]()
    for poison in POISONS:
        with pytest.MonkeyPatch.context() as patch:
            fill_memory(patch, *poison)
            results = place.run(call)
        assert not (what := differing(results, call.expected())), f"memory of {poison}: {what}"


def fill_memory(patch: pytest.MonkeyPatch, number: float, byte: int) -> None:
    """torch.empty and its kin return this."""

    def filled(make: Callable) -> Callable:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(number if tensor.is_floating_point() else byte)

        return made

    for name in ("empty", "empty_like"):
        patch.setattr(torch, name, filled(getattr(torch, name)))


def compiles_whole(op: str, place: Place, backend: str = "inductor") -> None:
    """torch.compile(fullgraph=True) around the op changes no bit."""
    call = TYPICAL[op]()
    torch.compiler.reset()
    compiled = torch.compile(lambda *tensors: tuple(call.run(*tensors)), fullgraph=True, backend=backend)
    assert not (what := differing(place.run(replace(call, run=compiled)), call.expected())), what


def more_than_32_bits_count(op: str, place: Place, count: int) -> None:
    """Windows at the start, across 2^30, 2^31 and 2^32, and at the end hold what the op makes of these windows alone."""
    call = big(op, count)
    tensors = call.tensors(place.device)
    with peftk.use(place.implementation):
        results = call.run(count, *tensors)
    edges = [0, *(power for power in POWERS if power < count), count]
    for edge in edges:
        first, last = max(edge - EDGE, 0) // EDGE * EDGE, min(edge + EDGE, count)
        window = tuple(t.cpu() for t in call.window(tensors, first, last))
        got = call.result(results, first, last)
        assert not (what := differing(got, call.run(last - first, *window))), f"elements {first} to {last}: {what}"


# ---- streams, graphs, devices -----------------------------------------------------------------------------------------------


def uses_the_current_stream(op: str, place: Place, cuda: Any = torch.cuda) -> None:
    """On a side stream whose inputs arrive late: an op on any other stream reads zeros or writes too late."""
    call, side = TYPICAL[op](), cuda.Stream()
    arriving = place.move(call)
    inputs = tuple(torch.zeros_like(t) for t in arriving)
    with cuda.stream(side):
        place.run(call, arriving)  # compiled, loaded, memory at hand
    cuda.synchronize()
    with cuda.stream(side):
        cuda._sleep(SOME)
        for tensor, late in zip(inputs, arriving, strict=True):
            tensor.copy_(late)
        results = place.run(call, inputs)
    side.synchronize()
    assert not (what := differing(results, call.expected())), what


def leaves_the_default_stream_alone(op: str, place: Place, cuda: Any = torch.cuda) -> None:
    """While the default stream is busy, a side stream's call is done before it."""
    call, side = TYPICAL[op](), cuda.Stream()
    tensors = place.move(call)
    with cuda.stream(side):
        place.run(call, tensors)
    cuda.synchronize()
    busy = cuda.Event()
    cuda._sleep(LONG)
    busy.record()
    with cuda.stream(side):
        place.run(call, tensors)
    side.synchronize()
    assert not busy.query(), "the call waited for the default stream"
    cuda.synchronize()


def does_not_synchronise(op: str, place: Place, cuda: Any = torch.cuda) -> None:
    """As far as torch sees it; what C++ does by itself shows in a capture, where waiting is an error."""
    call = TYPICAL[op]()
    tensors = place.move(call)
    place.run(call, tensors)
    cuda.synchronize()
    cuda.set_sync_debug_mode("error")
    try:
        place.run(call, tensors)
    finally:
        cuda.set_sync_debug_mode("default")


def replays_from_a_graph(op: str, place: Place, capture: Callable = capture, cuda: Any = torch.cuda) -> None:
    """Captured once, replayed on new inputs: the CPU's bits. The capture itself refuses a wait for the GPU, an allocation from
    C++ and another stream."""
    call, other = TYPICAL[op](), TYPICAL[op]()
    assert differing(call.expected(), other.expected())
    inputs = place.move(call)
    replay = capture(lambda: place.run(call, inputs))
    for current in (other, call):
        for tensor, new in zip(inputs, current.tensors, strict=True):
            tensor.copy_(new)
        results = replay()
        cuda.synchronize()
        assert not (what := differing(results, current.expected())), what


def runs_where_its_tensors_are(op: str, place: Place, cuda: Any = torch.cuda) -> None:
    """On a device that isn't the current one, which stays what it was."""
    call, before = TYPICAL[op](), cuda.current_device()
    results = place.run(call)
    assert cuda.current_device() == before
    assert all(str(result.device) == place.device for result in results)
    assert not (what := differing(results, call.expected())), what
