"""Steps of AdamW on a GPU, in sizes that no emulator reaches: the reference's bits, out of a graph too, and beyond 2^32 elements.
The bodies run on the CPU as well, where small sizes show that they can fail."""

from __future__ import annotations

import pytest
import torch
from ops.test_adamw_step import HYPER, State, parameters, state8, state32

import peftk
from bench.gpu.device import capture, why_no_gpu
from gpu.calls import CPU, EDGE, GPU, PERIOD, REFERENCE, Place, Tensors, differing, repeated
from gpu.fake import FakeGpu
from peftk.ops import adamw_step, adamw_step8

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW, MANY = (5, 0, 256, 700), (*range(200), 70_001, 3_000_001)  # elements
HUGE, NOT_SO_HUGE = 2**32 + 3 * 4096 + 33, 2**16 + 33
PLACES = [pytest.param(CPU, FEW, id="cpu"), *(pytest.param(p, MANY, id=str(p), marks=pytest.mark.gpu) for p in GPU)]
AT_PLACES = pytest.mark.parametrize(("place", "counts"), PLACES)
BITS = pytest.mark.parametrize("bits", [32, 8])


@pytest.fixture(autouse=True)
def there(request: pytest.FixtureRequest):
    """Skips what can't run here, with its reason."""
    place = request.node.callspec.params.get("place", CPU)
    if reason := (place.device == "cuda" and why_no_gpu()) or place.why_not("adamw_step"):
        pytest.skip(reason)


def made(bits: int, counts: tuple[int, ...], dtype: torch.dtype) -> State:
    return parameters(counts, dtype) | (state32 if bits == 32 else state8)(counts)


def at(place: Place, state: State) -> State:
    return {name: [t.detach().clone().to(place.device) for t in tensors] for name, tensors in state.items()}


def stepped(place: Place, bits: int, state: State, step: int = 3) -> Tensors:
    """All tensors of a copy after a step."""
    state = at(place, state)
    with peftk.use(place.implementation):
        (adamw_step if bits == 32 else adamw_step8)(**state, step=step, **HYPER)
    return tuple(t for tensors in state.values() for t in tensors)


def assert_right(results: Tensors, bits: int, state: State) -> None:
    assert not (what := differing(results, stepped(REFERENCE, bits, state))), what


@AT_PLACES
@BITS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference_bit_for_bit(place, counts, bits, dtype):
    state = made(bits, counts, dtype)
    for _ in range(2):
        assert_right(stepped(place, bits, state), bits, state)


@BITS
def test_a_wrong_bit_is_found(bits):
    state = made(bits, FEW, torch.float32)
    results = stepped(CPU, bits, state)
    results[-1][-1:].view(torch.uint8)[:1].bitwise_xor_(1)
    with pytest.raises(AssertionError, match=f"result {len(results) - 1}, element"):
        assert_right(results, bits, state)


@AT_PLACES
@BITS
def test_replays_from_a_graph(place, counts, bits):
    """Captured once, replayed on new values: no wait for the GPU, no allocation past torch's allocator, no other stream."""
    first, second = (made(bits, counts, torch.bfloat16) for _ in range(2))
    inputs = at(place, first)
    replay = (capture if place.device == "cuda" else FakeGpu().capture)(lambda: stepped(place, bits, inputs))
    for name, tensors in second.items():
        for old, new in zip(inputs[name], tensors, strict=True):
            old.copy_(new)
    assert_right(replay(), bits, second)


BIG = [
    pytest.param(CPU, NOT_SO_HUGE, id="cpu"),
    *(pytest.param(p, HUGE, id=str(p), marks=pytest.mark.gpu) for p in GPU),
]


@pytest.mark.parametrize(("place", "count"), BIG)
def test_more_than_32_bits_count(place, count):
    """Windows at the start, across 2^31 and 2^32, and at the end hold what a step makes of these windows alone."""
    if place.device == "cuda" and torch.cuda.mem_get_info()[0] < 14 * count:
        pytest.skip(f"{14 * count >> 30} GB of memory are not free")
    values, codes = torch.randn(PERIOD).bfloat16(), torch.randint(256, (PERIOD,), dtype=torch.uint8)
    made_of = dict(params=values, grads=values.flip(0), state1=codes, state2=codes.flip(0))
    state = {name: [repeated(tile, count, place.device)] for name, tile in made_of.items()}
    state |= {name: [repeated(torch.rand(10007) + 0.5, -(-count // 256), place.device)] for name in ("absmax1", "absmax2")}

    def window(first: int, last: int) -> State:
        ends = {name: (first // 256, -(-last // 256)) if name.startswith("absmax") else (first, last) for name in state}
        return {name: [state[name][0][slice(*ends[name])].cpu().clone()] for name in state}

    edges = [min(max(edge - EDGE, 0) // 256 * 256, count) for edge in (0, 2**31, 2**32, count) if edge <= count]
    windows = [(edge, min(edge + 2 * EDGE, count)) for edge in edges]
    before = [window(*ends) for ends in windows]
    with peftk.use(place.implementation):
        adamw_step8(**state, step=3, **HYPER)
    for ends, own in zip(windows, before, strict=True):
        assert_right(tuple(t for tensors in window(*ends).values() for t in tensors), 8, own)
