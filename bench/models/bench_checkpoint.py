"""A whole checkpoint from bf16 to NF4, folder to folder: ``peftk quantize``, which syncs its files and reads each weight twice,
for its error, beside transformers with bitsandbytes, load and save, which do neither.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench import peers
from bench.goals import Goal
from bench.limits import Limits
from bench.measure import Candidate, Case, Row, Work, interleave, rows_of
from peftk.cli import main

TESTS = ("tests/streaming", "tests/cli/test_quantize.py")
OURS, THEIRS = "peftk quantize", "transformers with bitsandbytes"
GOALS = (Goal(THEIRS, 1.0),)
LAYERS, VOCABULARY = 4, 32000


def rows(size: int, repeat: int, limits: Limits) -> Iterator[list[Row]]:
    """One case, a Llama of four layers, a quarter of ``size`` wide."""
    with tempfile.TemporaryDirectory() as folder:
        everyone = candidates(Path(folder), size // 4)
        present = [candidate for candidate in everyone if candidate.run is not None]
        times = dict(zip([c.who for c in present], interleave([c.run for c in present], repeat, budget=120.0), strict=True))
        read, write = (_bytes(Path(folder) / name) for name in ("dense", "out"))
        shape = f"whole checkpoint, {read / 1e6:.0f} MB bf16 -> {write / 1e6:.0f} MB NF4, {LAYERS} layers of {size // 4}"
        yield rows_of(Case(shape, Work(read, write), everyone, GOALS), limits, times, {})


def candidates(folder: Path, width: int) -> list[Candidate]:
    """Each writes a new folder at every call; the last one is ``out``."""
    _checkpoint(folder / "dense", width)
    count = itertools.count()

    def fresh() -> Path:
        shutil.rmtree(folder / "out", ignore_errors=True)
        return folder / f"out-{next(count)}"

    def ours() -> None:
        out = fresh()
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["quantize", "--model", str(folder / "dense"), "--out", str(out)]) == 0
        out.rename(folder / "out")

    def theirs() -> peers.Run:
        import transformers

        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )

        def run() -> None:
            out = fresh()
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder / "dense", quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
            )
            model.save_pretrained(out)
            out.rename(folder / "out")

        return run

    return [Candidate(OURS, ours), peers.candidate(THEIRS, ["transformers", peers.BITSANDBYTES], theirs)]


def _checkpoint(folder: Path, width: int) -> None:
    """Random bf16 weights, a file a layer."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=LAYERS, num_attention_heads=max(1, width // 64),
        vocab_size=VOCABULARY, architectures=["LlamaForCausalLM"], dtype="bfloat16", tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    places = {}
    for layer in ("embed_tokens", "norm", *(f"layers.{i}." for i in range(LAYERS))):
        names = {name: p.shape for name, p in model.named_parameters() if f"model.{layer}" in name}
        file = f"{layer.strip('.')}.safetensors"
        save_file({n: torch.randn(shape).mul_(0.02).bfloat16() for n, shape in names.items()}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
