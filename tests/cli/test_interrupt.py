"""Ctrl-C and SIGTERM: a run ends between two steps with a checkpoint; a folder has one run at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from peftk.cli import main
from peftk.cli.interrupt import asked_to_stop
from peftk.cli.resume import latest_checkpoint

FLAGS = ("--seq-len 32 --batch-size 2 --grad-accum 1 --r 4 --steps 60 --dropout 0.2 --save-every 0 --threads 1").split()


def command(model_folder: Path, text_file: Path, out: Path, *more: str) -> list[str]:
    return ["finetune", "--model", str(model_folder), "--data", str(text_file), "--out", str(out), *FLAGS, *more]


def rows(out: Path) -> list[str]:
    return (out / "loss.csv").read_text().splitlines() if (out / "loss.csv").exists() else []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.full)])
def test_an_interrupted_run_is_saved_and_goes_on_exactly(model_folder, text_file, tmp_path, capsys, number, status):
    whole, out = tmp_path / "whole", tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "peftk", *command(model_folder, text_file, out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    while len(rows(out)) <= 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)  # for as long as a second run knocks
    try:
        assert main(command(model_folder, text_file, out, "--overwrite")) == 2
        assert "another run is at work there" in capsys.readouterr().err
    finally:
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=120)
    step = int(latest_checkpoint(out).name.removeprefix("step-"))
    assert process.returncode == status and f"interrupted after step {step} of 60, which is saved" in errors.decode()
    assert 4 <= step < 60 and len(rows(out)) == step + 2
    assert main(command(model_folder, text_file, out, "--resume")) == 0
    assert main(command(model_folder, text_file, whole)) == 0
    assert rows(out) == rows(whole)
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (whole, out)]
    assert weights[0] == weights[1]


def test_a_second_signal_ends_at_once(capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), asked_to_stop() as stop:
        assert stop() == 0
        signal.raise_signal(signal.SIGINT)
        assert stop() == signal.SIGINT and "stopping after this step" in capsys.readouterr().err
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_thread_takes_no_signals():
    def ask() -> None:
        with asked_to_stop() as stop:
            answers.append(stop())

    answers: list[int] = []
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert answers == [0]
