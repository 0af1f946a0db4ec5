"""The ops on a real device, by every GPU implementation they have. Bodies that mean something on a CPU run there too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpu import bodies
from gpu.calls import CPU, GPU, REFERENCE, TYPICAL, Place, big

BEYOND = (2**31 + 64 * 1001 + 33, 2**32 + 64 * 1001 + 33)  # elements


def at(*places: Place, **marks: pytest.MarkDecorator):
    """The test with ``op`` and ``place``: every op at these, and at the GPU's, which are marked ``gpu``."""
    marked = [(place, marks.get("cpu", ())) for place in places] + [(place, pytest.mark.gpu) for place in GPU]
    every = [pytest.param(op, place, marks=mark, id=f"{op}-{place}") for op in TYPICAL for place, mark in marked]
    return pytest.mark.parametrize(("op", "place"), every)


@pytest.fixture(autouse=True)
def there(request: pytest.FixtureRequest):
    """Skips what can't run here, with the reason that the op or its door gives."""
    arguments = request.node.callspec.params
    if reason := arguments["place"].why_not(arguments["op"]):
        pytest.skip(reason)


@at(REFERENCE)
def test_equals_the_cpu_kernels_bit_for_bit(op: str, place: Place):
    bodies.same_bits(op, place)


@at(REFERENCE, CPU)
def test_ten_runs_are_one_result(op: str, place: Place):
    bodies.same_every_time(op, place)


@at(REFERENCE, CPU)
def test_every_byte_is_written(op: str, place: Place):
    bodies.every_byte_is_written(op, place)


@at(CPU)
def test_compiles_whole(op: str, place: Place):
    bodies.compiles_whole(op, place, "aot_eager" if place.device == "cpu" else "inductor")


def free_memory(device: str) -> int:
    """Bytes."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(facts["MemAvailable"].split()[0]) * 1024


@pytest.mark.parametrize("count", BEYOND)
@at(CPU, cpu=pytest.mark.full)
def test_more_than_32_bits_count(op: str, place: Place, count: int):
    needed, free = round(1.2 * big(op, count).nbytes), free_memory(place.device)
    if needed > free:
        pytest.skip(f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    bodies.more_than_32_bits_count(op, place, count)


@at()
def test_uses_the_current_stream(op: str, place: Place):
    bodies.uses_the_current_stream(op, place)


@at()
def test_leaves_the_default_stream_alone(op: str, place: Place):
    bodies.leaves_the_default_stream_alone(op, place)


@at()
def test_does_not_synchronise(op: str, place: Place):
    bodies.does_not_synchronise(op, place)


@at()
def test_replays_from_a_graph(op: str, place: Place):
    bodies.replays_from_a_graph(op, place)


@at()
def test_runs_where_its_tensors_are(op: str, place: Place):
    if (count := torch.cuda.device_count()) < 2:
        pytest.skip(f"needs a second device, {count} here")
    with torch.cuda.device(0):
        bodies.runs_where_its_tensors_are(op, Place("cuda:1", place.implementation))
