"""Whole checkpoints: killed at any moment, in constant memory, with a report; by quantize and by merge."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import peftk
from peftk.cli import main

RUNS = Path(__file__).with_name("whole_runs.py")
ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, RUNS, *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def sharded(model_folder, tmp_path_factory) -> Path:
    """The small Llama in a file for each tensor or two."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("sharded")
    AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(folder, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("times", [5, pytest.param(60, marks=pytest.mark.full)])
def test_killed_at_any_moment(sharded, tmp_path, times):
    """The folder is whole or not there, and the one of the last run is byte for byte that of a run which nobody killed."""
    told = run("kill", tmp_path / "out", times, times, "--", "quantize", "--model", sharded, "--out", tmp_path / "out")
    assert told["same"] and told["left"] == ["out"], told
    assert told["hits"] >= times // 4, told  # the run that was timed may have been a slow one


def synthetic(folder: Path, layers: int, width: int, vocabulary: int) -> int:
    """A Llama's checkpoint in bf16, a file a layer beside the embedding's, written without building the model. Bytes of the
    largest file."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=8,
        architectures=["LlamaForCausalLM"], dtype="bfloat16", tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(name.split(".")[2] if ".layers." in name else "rest", {})[name] = tuple(parameter.shape)
    places = {}
    for group, shapes in groups.items():
        tensors = {name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in shapes.items()}
        save_file(tensors, folder / f"{group}.safetensors", metadata={"format": "pt"})
        places |= dict.fromkeys(shapes, f"{group}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def adapter_for(folder: Path, to: Path) -> None:
    """LoRA of rank 4 on all linear layers, random."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    peftk.attach(model, peftk.LoraConfig(r=4, target_modules="all-linear"))
    from peftk.checkpoint import adapter_tensors

    tensors = {key: torch.randn(t.shape) * 0.01 for key, t in adapter_tensors(model, "default").items()}
    to.mkdir()
    save_file(tensors, to / "adapter_model.safetensors")
    (to / "adapter_config.json").write_text(json.dumps(peftk.LoraConfig(r=4, target_modules="all-linear").to_dict()))


SIZES = [(2, 1024, 24000), pytest.param((4, 2048, 100_000), marks=pytest.mark.full)]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("size", SIZES, ids=["77 MB", "0.8 GB"])
def test_memory_stays_below_the_largest_file(model_folder, tmp_path, size):
    """Of quantising, and of merging into 4 bits, which does that twice for the base's own error."""
    (tmp_path / "big").mkdir()
    largest = synthetic(tmp_path / "big", *size)
    commands = []
    for command in ("quantize", "merge"):
        for source, out in ((model_folder, f"small-{command}"), (tmp_path / "big", f"big-{command}")):
            commands += ["--", command, "--model", source, "--out", tmp_path / out]
            if command == "merge":
                adapter_for(source, tmp_path / f"adapter-{out}")
                commands += ["--adapter", tmp_path / f"adapter-{out}", "--to", "nf4"]
    peaks = run("peak", *commands)
    assert len(peaks) == 2 and max(peaks) <= 1.1 * largest, (peaks, largest)


def test_the_report(sharded, tmp_path, capsys):
    flags = ["--report", str(tmp_path / "errors.csv"), "--plot", str(tmp_path / "errors.png")]
    assert main(["quantize", "--model", str(sharded), "--out", str(tmp_path / "out"), *flags]) == 0
    told = capsys.readouterr().out
    with open(tmp_path / "errors.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14 and {row["kind"] for row in rows} == {"nf4"}
    assert all(0.05 < float(row["relative"]) < 0.12 for row in rows)
    worst = max(rows, key=lambda row: float(row["relative"]))
    assert f"worst: {worst['layer']} " in told and "down_proj (nf4)     2" in told
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "out").glob("quantize_report*"))


def test_a_changed_input_is_no_resume(sharded, tmp_path, capsys, monkeypatch):
    from peftk.streaming import work

    source = tmp_path / "in"
    source.mkdir()
    for path in sharded.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    command = ["quantize", "--model", str(source), "--out", str(tmp_path / "out")]

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    monkeypatch.setattr(work, "publish", killed)
    with pytest.raises(Killed):
        main(command)
    monkeypatch.undo()
    capsys.readouterr()
    assert main([*command, "--resume", "--block-size", "128"]) == 2
    assert "block_size was null, now 128. Delete that folder to start anew" in capsys.readouterr().err
    file = sorted(source.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main([*command, "--resume"]) == 2
    assert "is another one: inputs was" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_input_that_changes_meanwhile_is_told(sharded, tmp_path, capsys, monkeypatch):
    from peftk.cli import whole

    prints = iter(range(9))
    monkeypatch.setattr(whole, "fingerprint", lambda files: next(prints))
    assert main(["quantize", "--model", str(sharded), "--out", str(tmp_path / "out")]) == 2
    assert "a file has changed while it was read" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_places_of_the_report_are_looked_at_first(sharded, tmp_path, capsys):
    flags = ["--report", str(tmp_path / "no" / "errors.csv")]
    assert main(["quantize", "--model", str(sharded), "--out", str(tmp_path / "out"), *flags]) == 2
    assert "--report" in (told := capsys.readouterr().err) and "no such folder" in told and not (tmp_path / "out").exists()
