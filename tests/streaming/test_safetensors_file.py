"""The format in pieces, against the safetensors package."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftk.streaming.safetensors_file import Entry, Writer, read_header

TENSORS = {
    "odd": torch.arange(7, dtype=torch.uint8),
    "bf16": torch.randn(3, 5).bfloat16(),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False]),
    "wide": torch.randn(2, 2, dtype=torch.float64),
}


def test_what_the_package_writes_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    spans, metadata = read_header(path)
    assert metadata == {"format": "pt"} and set(spans) == set(TENSORS)
    for name, tensor in TENSORS.items():
        whole = tensor.reshape(-1).view(torch.uint8)
        assert spans[name].shape == tuple(tensor.shape) and spans[name].nbytes == whole.numel()
        middle = whole.numel() // 2
        pieces = [spans[name].read(0, middle), spans[name].read(middle, whole.numel())]
        assert torch.equal(torch.cat(pieces), whole), name


def test_the_package_reads_what_is_written(tmp_path):
    """In any order and in pieces; a late entry is shorter than its room; wide dtypes come first, so that all are aligned."""
    path = tmp_path / "a.safetensors"
    late = torch.frombuffer(bytearray(b'{"x": 1}'), dtype=torch.uint8)
    entries = [Entry("late", "U8", (50,), 50, late=True), *(Entry.of(name, tensor) for name, tensor in TENSORS.items())]
    file = Writer(path, entries)
    file.put("late", late)
    for name, tensor in reversed(TENSORS.items()):
        data = tensor.reshape(-1).view(torch.uint8)
        half = data.numel() // 2
        file.put(name, data[half:], half)
        file.put(name, data[:half])
    assert torch.equal(file.get("odd", 2, 5), TENSORS["odd"][2:5])
    file.finish()
    file.close()
    found = load_file(path)
    assert set(found) == {*TENSORS, "late"} and torch.equal(found["late"], late)
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor), name
    spans, _ = read_header(path)
    assert all(span.start % max(1, TENSORS[n].element_size()) == 0 for n, span in spans.items() if n in TENSORS)


def test_more_bytes_than_an_entry_has_are_refused(tmp_path):
    file = Writer(tmp_path / "a", [Entry.of("x", torch.zeros(2))])
    with pytest.raises(ValueError, match="x: expected 8 bytes, got 12"):
        file.put("x", torch.zeros(3))
    file.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:4], "expected a safetensors file, got 4 bytes"),
        (lambda data: b"\xff" * 8 + data[8:], "with a header of"),
        (lambda data: data[:8] + b"[" + data[9:], "expected a safetensors file"),
        (lambda data: data[:-4], "in a file of"),
        (lambda data: data.replace(b'"shape":[2]', b'"shape":[3]'), "8 bytes for F32 of shape"),
    ],
)
def test_broken_files_are_named(tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value)


def test_a_file_that_shrank_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1000)}, path)
    span = read_header(path)[0]["x"]
    os.truncate(path, span.start + 100)
    with pytest.raises(ValueError, match=r"a.safetensors: expected at least \d+ bytes, got"):
        span.read(0, span.nbytes)
