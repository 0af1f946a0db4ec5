"""The bodies of tests/gpu find what they are there for: bugs planted in an op, on the CPU, under a stand-in for torch.cuda."""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from gpu import bodies, calls, sanitized
from gpu.calls import CPU, REFERENCE, TYPICAL
from gpu.fake import FakeGpu
from peftk.native import why_not_native

pytestmark = pytest.mark.skipif(bool(why_not_native()), reason=why_not_native() or "native")
EVERY_OP = pytest.mark.parametrize("op", list(TYPICAL))


class Cuda:
    """torch.cuda as far as the bodies use it, on the CPU, where everything is done at once."""

    def __init__(self, query: bool = False) -> None:
        self.log: list[str] = []
        self.stream_of: str = "default"
        self.done = query

    def Stream(self) -> Cuda:
        return self

    Event = Stream

    @contextlib.contextmanager
    def stream(self, side: Cuda):
        self.stream_of = "side"
        yield
        self.stream_of = "default"

    def _sleep(self, cycles: int) -> None:
        self.log.append(f"sleep on {self.stream_of}")

    def synchronize(self) -> None:
        self.log.append("wait")

    def record(self) -> None:
        self.log.append(f"event on {self.stream_of}")

    def query(self) -> bool:
        return self.done

    def set_sync_debug_mode(self, mode: str) -> None:
        self.log.append(mode)

    def current_device(self) -> int:
        return len([entry for entry in self.log if entry == "another device"])


def plant(monkeypatch: pytest.MonkeyPatch, op: str, bug: Callable[..., Any], name: str = "cpu") -> None:
    """``bug(run, *arguments)`` in place of an implementation's run(*arguments)."""
    module = importlib.import_module(f"peftk.ops.{op}")
    (right,) = (implementation for implementation in module.TABLE if implementation.name == name)
    wrong = replace(right, run=lambda *arguments: bug(right.run, *arguments))
    monkeypatch.setattr(module, "TABLE", tuple(wrong if each is right else each for each in module.TABLE))


def results_of(returned: Any, arguments: tuple) -> tuple[torch.Tensor, ...]:
    """What a run made: what it returned, or its last argument, ``out``."""
    if returned is None:
        return (arguments[-1],)
    return returned if isinstance(returned, tuple) else (returned,)


def flip_last_bit(run: Callable, *arguments: Any) -> Any:
    """The last element of the first result is off by its lowest bit."""
    returned = run(*arguments)
    first = results_of(returned, arguments)[0]
    if first.numel():
        first.view(-1)[-1:].view(torch.uint8)[:1].bitwise_xor_(1)
    return returned


@EVERY_OP
def test_one_wrong_bit_is_found(op: str, monkeypatch: pytest.MonkeyPatch):
    bodies.same_bits(op, REFERENCE)
    plant(monkeypatch, op, flip_last_bit, "reference")
    with pytest.raises(AssertionError, match=r"result 0, element \d+ of \d+: "):
        bodies.same_bits(op, REFERENCE)


def test_the_sanitized_script_finds_it_too(monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, "nf4_quantize", flip_last_bit, "reference")
    with pytest.raises(SystemExit, match=r"^nf4_quantize by cpu-reference: \(.*result 0, element"):
        sanitized.main("nf4_quantize", "cpu", "reference")


def test_a_wrong_shape_or_number_of_results_is_found():
    two = (torch.zeros(2), torch.zeros(2))
    assert calls.differing(two[:1], two) == "1 results, expected 2"
    assert calls.differing(two[:1], (torch.zeros(3),)) == "result 0: torch.float32 (2,), expected torch.float32 (3,)"
    assert calls.differing((torch.tensor([float("nan"), 0.0]),), (torch.tensor([float("nan"), 0.0]),)) == ""
    assert calls.differing((torch.tensor([0.0]),), (torch.tensor([-0.0]),)) == "result 0, element 0 of 1: 0.0, expected -0.0"


@EVERY_OP
def test_a_result_that_varies_is_found(op: str, monkeypatch: pytest.MonkeyPatch):
    turns = itertools.count()

    def sometimes(run: Callable, *arguments: Any) -> Any:
        return flip_last_bit(run, *arguments) if next(turns) == 7 else run(*arguments)

    plant(monkeypatch, op, sometimes)
    with pytest.raises(AssertionError, match="result 0, element"):
        bodies.same_every_time(op, CPU)


@EVERY_OP
def test_an_unwritten_byte_is_found(op: str, monkeypatch: pytest.MonkeyPatch):
    """The last element is left as the memory came."""

    def unwritten(run: Callable, *arguments: Any) -> Any:
        returned = run(*arguments)
        first = results_of(returned, arguments)[0]
        first.view(-1)[-1:] = torch.empty(1, dtype=first.dtype)
        return returned

    plant(monkeypatch, op, unwritten)
    with pytest.raises(AssertionError, match="memory of .*result 0, element"):
        bodies.every_byte_is_written(op, CPU)


@EVERY_OP
def test_a_graph_break_is_found(op: str, monkeypatch: pytest.MonkeyPatch):
    breaking = TYPICAL[op]()

    def run(*tensors: torch.Tensor) -> calls.Tensors:
        torch._dynamo.graph_break()
        return breaking.run(*tensors)

    monkeypatch.setitem(TYPICAL, op, lambda: replace(breaking, run=run))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        bodies.compiles_whole(op, CPU, "aot_eager")


@EVERY_OP
@pytest.mark.parametrize("wrapped_from", ["reads", "writes"])
def test_an_index_that_wraps_is_found(op: str, wrapped_from: str, monkeypatch: pytest.MonkeyPatch):
    """Elements beyond a bound that stands for 2^31 are made from, or land at, the index modulo the bound."""
    bound, count = 2**20, 2**20 + 64 * 1001 + 33
    monkeypatch.setattr(bodies, "POWERS", (bound,))
    bodies.more_than_32_bits_count(op, CPU, count)

    def wrapping(run: Callable, *arguments: Any) -> Any:
        returned = run(*arguments)
        first = results_of(returned, arguments)[0].view(-1)
        at = bound * first.numel() // count // 2 * 2  # of a result with two elements a byte, half
        if wrapped_from == "reads":
            first[at:] = first[: first.numel() - at].clone()
        else:
            first[: first.numel() - at] = first[at:].clone()
        return returned

    at_most_once = iter([wrapping])  # the windows, which are small, are right
    plant(monkeypatch, op, lambda run, *arguments: next(at_most_once, lambda run, *rest: run(*rest))(run, *arguments))
    with pytest.raises(AssertionError, match="elements .*: result 0, element"):
        bodies.more_than_32_bits_count(op, CPU, count)


# ---- streams, graphs, devices: that the bodies ask for the right things in the right order -------------------------------------


@EVERY_OP
def test_inputs_arrive_late_on_a_side_stream(op: str, monkeypatch: pytest.MonkeyPatch):
    cuda, seen = Cuda(), []

    def watch(run: Callable, *arguments: Any) -> Any:
        seen.append((cuda.stream_of, cuda.log.count("sleep on side")))
        return run(*arguments)

    plant(monkeypatch, op, watch)
    bodies.uses_the_current_stream(op, CPU, cuda)
    assert seen[:2] == [("side", 0), ("side", 1)] and cuda.log == ["wait", "sleep on side", "wait"]


@EVERY_OP
def test_inputs_read_too_early_are_found(op: str, monkeypatch: pytest.MonkeyPatch):
    """As from a stream that doesn't wait for the copies: the inputs are zeros."""
    cuda = Cuda()

    def too_early(run: Callable, *arguments: Any) -> Any:
        if not cuda.log.count("sleep on side") or cuda.stream_of == "default":
            return run(*arguments)
        inputs = [a for a in arguments[: -1 if op == "nf4_dequantize" else None] if isinstance(a, torch.Tensor)]
        early = {id(a): torch.zeros_like(a) for a in inputs}
        return run(*(early.get(id(a), a) for a in arguments))

    plant(monkeypatch, op, too_early)
    with pytest.raises(AssertionError, match="result 0, element"):
        bodies.uses_the_current_stream(op, CPU, cuda)


@EVERY_OP
def test_a_wait_for_the_default_stream_is_found(op: str):
    bodies.leaves_the_default_stream_alone(op, CPU, cuda := Cuda())
    assert cuda.log == ["wait", "sleep on default", "event on default", "wait", "wait"]
    with pytest.raises(AssertionError, match="the call waited for the default stream"):
        bodies.leaves_the_default_stream_alone(op, CPU, Cuda(query=True))


@EVERY_OP
def test_a_synchronisation_is_found(op: str, monkeypatch: pytest.MonkeyPatch):
    bodies.does_not_synchronise(op, CPU, cuda := Cuda())
    assert cuda.log == ["wait", "error", "default"]

    def waiting(run: Callable, *arguments: Any) -> Any:
        if cuda.log[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return run(*arguments)

    plant(monkeypatch, op, waiting)
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        bodies.does_not_synchronise(op, CPU, cuda)
    assert cuda.log[-1] == "default"


@EVERY_OP
def test_a_graph_of_stale_results_is_found(op: str):
    bodies.replays_from_a_graph(op, CPU, FakeGpu().capture, Cuda())

    def stale(run: Callable) -> Callable:
        kept = run()
        return lambda: kept

    with pytest.raises(AssertionError, match="result 0, element"):
        bodies.replays_from_a_graph(op, CPU, stale, Cuda())


@EVERY_OP
def test_another_current_device_is_found(op: str, monkeypatch: pytest.MonkeyPatch):
    bodies.runs_where_its_tensors_are(op, CPU, cuda := Cuda())
    plant(monkeypatch, op, lambda run, *arguments: (cuda.log.append("another device"), run(*arguments))[1])
    with pytest.raises(AssertionError):
        bodies.runs_where_its_tensors_are(op, CPU, cuda)
