"""Checkpoints in folders: one file, several with an index, torch's own; and what is wrong with one is named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from streaming.conftest import weight

from peftk.streaming.source import fingerprint, open_folder
from peftk.streaming.values import FileValues

TENSORS = {"a": weight(4, 6), "b": weight(3, 2, seed=1, dtype=torch.bfloat16)}


def indexed(folder, places: dict[str, str], suffix: str = "safetensors") -> None:
    for name in set(places.values()):
        tensors = {key: TENSORS[key] for key, file in places.items() if file == name}
        save_file(tensors, folder / name) if suffix == "safetensors" else torch.save(tensors, folder / name)
    stem = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": places}))


def check(folder, files: int) -> None:
    source = open_folder(folder)
    assert len(source.files) == files and set(source.tensors) == set(TENSORS)
    for key, tensor in TENSORS.items():
        values = FileValues(source.tensors[key])
        assert values.shape == tuple(tensor.shape)
        for _ in range(2):
            parts = [values.flat(0, 3), values.flat(3, tensor.numel())]
            assert torch.equal(torch.cat(parts), tensor.view(-1)), key


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_forms_of_a_checkpoint(tmp_path, suffix):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    indexed(tmp_path / "two", {"a": f"x.{suffix}", "b": f"y.{suffix}"}, suffix)
    check(tmp_path / "two", 2)
    if suffix == "safetensors":
        save_file(TENSORS, tmp_path / "one" / "model.safetensors")
    else:
        torch.save(TENSORS, tmp_path / "one" / "pytorch_model.bin")
    check(tmp_path / "one", 1)


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(ValueError, match="expected model.safetensors, .* got $"):
        open_folder(tmp_path)
    indexed(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors", "c": "y.safetensors"}}))
    with pytest.raises(ValueError, match="index.json: names the tensor c, which y.safetensors is expected to have"):
        open_folder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "z.safetensors"}}))
    with pytest.raises(ValueError, match="index.json: names z.safetensors, which is expected in the folder"):
        open_folder(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="index.json: expected JSON with a weight_map"):
        open_folder(tmp_path)
    index.unlink()
    save_file({"a": TENSORS["a"]}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="the tensor a is expected once"):
        open_folder(tmp_path)


def test_a_changed_file_has_another_print(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(5 << 20))
    before = fingerprint([path])
    assert fingerprint([path]) == before
    with open(path, "r+b") as file:
        file.seek(2 << 20)
        file.write(b"x")
    assert fingerprint([path]) != before
