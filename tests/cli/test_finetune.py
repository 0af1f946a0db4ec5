from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import peftk
from peftk.cli import main, output

SMALL = ["--seq-len", "32", "--batch-size", "2", "--grad-accum", "2", "--r", "4", "--lr", "1e-2", "--dtype", "fp32"]


def finetune(model_folder, data, out, *flags):
    return main(["finetune", "--model", str(model_folder), "--data", str(data), "--out", str(out), *SMALL, *map(str, flags)])


def losses(out):
    with open(out / "loss.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_run_learns_and_leaves_a_whole_folder(model_folder, text_file, tmp_path, method, capsys, fresh_model):
    out = tmp_path / "out"
    assert finetune(model_folder, text_file, out, "--steps", 30, "--method", method, "--eval-every", 10) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss.csv",
        "loss.png",
        "run.json",
    ]
    rows = losses(out)
    measured = [float(row["eval_loss"]) for row in rows if row["eval_loss"]]
    assert [int(row["step"]) for row in rows] == list(range(31)) and len(measured) == 4
    assert measured[-1] < measured[0] - 1
    run = json.loads((out / "run.json").read_text())
    assert run["settings"]["method"] == method and run["summary"]["held_out_loss_after"] == measured[-1]
    assert run["summary"]["base_bytes"] < 4 * run["summary"]["base_parameters"] or method == "lora"
    printed = capsys.readouterr().out
    assert f"held-out loss  {measured[0]:.3f} -> {measured[-1]:.3f}" in printed
    for word in ("base ", "adapter ", "tokens/s", "minutes", "peak memory"):
        assert word in printed
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"

    model = fresh_model()
    if method == "qlora":
        peftk.quantize_model(model, progress=False)
    peftk.load_adapter(model, out)
    assert measured[-1] == pytest.approx(held_out_loss(model, text_file, model_folder), rel=1e-4)


def held_out_loss(model, text_file, model_folder):
    """By hand: the last 5 % of the tokens in rows of 32."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = [*tokenizer(text_file.read_text()).input_ids, tokenizer.eos_token_id]
    ids = ids[len(ids) - round(0.05 * len(ids)) :]
    total = count = 0
    with torch.no_grad():
        for i in range(0, len(ids), 32):
            row = torch.tensor([ids[i : i + 32]])
            if row.shape[1] > 1:
                total += model(input_ids=row, labels=row).loss.item() * (row.shape[1] - 1)
                count += row.shape[1] - 1
    return total / count


def test_hf_peft_reads_the_adapter(model_folder, text_file, tmp_path, fresh_model):
    peft = pytest.importorskip("peft")
    out = tmp_path / "out"
    assert finetune(model_folder, text_file, out, "--steps", 3, "--method", "lora") == 0
    ids = torch.randint(2, 250, (2, 9))
    theirs = peft.PeftModel.from_pretrained(fresh_model(), out)(input_ids=ids).logits
    ours = peftk.load_adapter(fresh_model(), out)(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, fresh_model()(input_ids=ids).logits, atol=1e-2)


@pytest.mark.parametrize("kind", ["completions", "conversations"])
def test_records_train_too(model_folder, tmp_path, kind):
    data = tmp_path / "data.jsonl"
    lines = []
    for i in range(40):
        if kind == "completions":
            lines.append({"prompt": f"{i} to be", "completion": " or not"})
        else:
            lines.append({"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "or not"}]})
    data.write_text("\n".join(json.dumps(line) for line in lines))
    out = tmp_path / "out"
    assert finetune(model_folder, data, out, "--steps", 15, "--seq-len", 64, "--eval-fraction", 0.2) == 0
    rows = losses(out)
    assert float(rows[-1]["eval_loss"]) < 0.5 * float(rows[0]["eval_loss"])


def test_gradient_checkpointing_changes_nothing(model_folder, text_file, tmp_path):
    flags = ["--steps", 3, "--dropout", 0.2]
    finetune(model_folder, text_file, tmp_path / "a", *flags)
    finetune(model_folder, text_file, tmp_path / "b", *flags, "--gradient-checkpointing")
    assert [row["loss"] for row in losses(tmp_path / "a")] == [row["loss"] for row in losses(tmp_path / "b")]


def test_the_seed_decides_everything(model_folder, text_file, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        finetune(model_folder, text_file, tmp_path / name, "--steps", 3, "--dropout", 0.1, "--seed", seed)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_a_killed_run_goes_on_with_the_same_losses(model_folder, text_file, tmp_path):
    """SIGKILL in mid-run, twice; dropout on, so that the random generator's state matters."""
    flags = [*SMALL, "--steps", "40", "--dropout", "0.2", "--eval-every", "7", "--threads", "1"]

    def start(out, *more):
        where = ["--model", str(model_folder), "--data", str(text_file), "--out", str(out)]
        command = [sys.executable, "-m", "peftk", "finetune", *where, *flags, *more]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, "--save-every", "5").communicate() and len(losses(whole)) == 41
    for rows, more in ((9, ()), (22, ("--resume",))):
        process = start(killed, "--save-every", "5", *more)
        deadline = time.monotonic() + 120
        while not (killed / "loss.csv").exists() or (killed / "loss.csv").read_bytes().count(b"\n") <= rows:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (killed / "adapter_model.safetensors").exists()
    assert main(["generate", "--adapter", str(killed), "--prompt", "x"]) == 2  # not finished, and said so
    printed, errors = start(killed, "--save-every", "5", "--resume").communicate()
    assert b"resuming after step" in printed, errors
    assert losses(killed) == losses(whole)
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (whole, killed)]
    assert weights[0] == weights[1]
    assert start(killed, "--resume").communicate()[0].strip().endswith(b"this run is finished already")


def test_resuming_with_other_settings_is_refused(model_folder, text_file, tmp_path, capsys):
    out = tmp_path / "out"
    finetune(model_folder, text_file, out, "--steps", 2)
    run = json.loads((out / "run.json").read_text())
    run.pop("summary")
    output.write_run(out, run)
    assert finetune(model_folder, text_file, out, "--steps", 3, "--resume", "--dropout", 0.5) == 2
    error = capsys.readouterr().err
    assert "--steps was 2, now 3" in error and "--dropout was 0.0, now 0.5" in error and "--lr was" not in error
    text_file.write_text("other " * 400)
    assert finetune(model_folder, text_file, out, "--steps", 2, "--resume") == 2
    assert "--data was" in capsys.readouterr().err


def test_a_folder_with_something_in_it_is_left_alone(model_folder, text_file, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("keep me")
    assert finetune(model_folder, text_file, out, "--steps", 1) == 2
    assert "the folder is not empty" in capsys.readouterr().err
    assert finetune(model_folder, text_file, out, "--steps", 1, "--resume") == 2
    assert "holds no run.json" in capsys.readouterr().err
    assert finetune(model_folder, text_file, out, "--steps", 1, "--overwrite") == 0
    assert (out / "letter.txt").read_text() == "keep me"


def test_bad_input_destroys_nothing(model_folder, text_file, tmp_path, capsys):
    out = tmp_path / "out"
    finetune(model_folder, text_file, out, "--steps", 1)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert finetune(model_folder, tmp_path / "none.txt", out, "--overwrite") == 2
    text_file.write_text("too short")
    assert finetune(model_folder, text_file, out, "--overwrite") == 2
    assert "do not fill one sequence of --seq-len 32" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seq-len", "4096"], "--seq-len 4096: the model takes at most 128 tokens"),
        (["--target-modules", "nonesuch"], "--target-modules nonesuch: "),
        (["--steps", "3", "--warmup", "4"], "--warmup 4: longer than the run, which has 3 steps"),
        (["--device", "toaster"], "--device toaster: expected auto, cpu or cuda"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
    ],
)
def test_user_errors_are_one_line_with_the_flag(model_folder, text_file, tmp_path, capsys, flags, message):
    assert finetune(model_folder, text_file, tmp_path / "out", *flags) == 2
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("peftk finetune: error: ")


@pytest.mark.parametrize("flag", ["--r=0", "--lr=-1", "--lr=nan", "--dropout=1", "--seq-len=1", "--schedule=linear", "--steps=x"])
def test_bad_flags_are_refused_by_name(model_folder, text_file, tmp_path, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        finetune(model_folder, text_file, tmp_path / "out", flag)
    assert stop.value.code == 2 and f"argument {flag.partition('=')[0]}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_steps_follow_from_epochs(model_folder, text_file, tmp_path):
    finetune(model_folder, text_file, tmp_path / "out", "--epochs", 0.25, "--eval-fraction", 0)
    rows = losses(tmp_path / "out")
    from transformers import AutoTokenizer

    tokens = len(AutoTokenizer.from_pretrained(model_folder)(text_file.read_text()).input_ids) + 1
    sequences = -(-tokens // 32)
    assert len(rows) - 1 == -(-(sequences // 4) // 4)
    assert all(row["eval_loss"] == "" for row in rows)
