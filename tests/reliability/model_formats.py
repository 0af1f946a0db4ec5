"""The formats that make a model of transformers: prompts, GGUF, 4-bit folders, CTranslate2, and what ``peftk generate`` reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny_models
import torch
import transformers
from task_models import small_whisper
from torch import nn

import peftk
from peftk.cli import main
from peftk.cli.errors import UserError
from peftk.cli.gguf import open_gguf
from peftk.cli.models import open_model
from peftk.cli.whisper_ct2 import open_whisper
from peftk.integrations.transformers import from_bitsandbytes
from tests.cli.conftest import CHAT_TEMPLATE, sentences
from tests.cli.test_gguf import write_llama
from tests.cli.test_whisper_ct2 import ct2_arrays, write, write_tokenizer
from tests.reliability.formats import (
    Format,
    bits,
    check_adapter,
    holds,
    loaded,
    written,
)
from tests.reliability.mutate import Files

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# ---- prompts --------------------------------------------------------------------------------------------------------

PROMPTS: dict[str, Callable[[], Any]] = {
    "prefix": lambda: peftk.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5),
    "plain": lambda: peftk.PTuningV2Config(num_virtual_tokens=2, attentions=["self"]),
    "prompt": lambda: peftk.PromptTuningConfig(num_virtual_tokens=3),
    "lstm": lambda: peftk.PTuningConfig(num_virtual_tokens=2, encoder_reparameterization_type="LSTM", encoder_hidden_size=4),
    "positions": lambda: peftk.PTuningConfig(positions=[0, 2], encoder_hidden_size=4),
}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return tiny_models.llama()


def prompt_samples() -> list[Files]:
    return [
        written(lambda folder, m=make: peftk.save_adapter(peftk.attach(llama(), m()), folder / "a")) for make in PROMPTS.values()
    ]


def run_llama(model: nn.Module) -> torch.Tensor:
    """Nothing where a prompt's places are for longer rows."""
    try:
        with torch.no_grad():
            return model(input_ids=torch.arange(9).view(1, 9)).logits
    except ValueError as error:
        holds("expected positions up to" in str(error), str(error))
        return torch.empty(0)


def load_prompt(folder: Path) -> nn.Module:
    loaded(llama(), folder / "a")
    return loaded(llama(), folder / "a", is_trainable=True)


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def gguf_samples() -> list[Files]:
    made = [written(lambda folder, q=kind: write_llama(folder / "m.gguf", q)) for kind in ("Q4_0", "F16")]
    return [*made, written(lambda folder: write_llama(folder / "m.gguf", "Q8_0", tied=False))]


def check_gguf(found: Any, folder: Path) -> None:
    model, tokenizer = found
    file = {t.name: t for t in gguf.GGUFReader(folder / "m.gguf").tensors}
    state = model.state_dict()
    holds(len(file) == len(dict(model.named_parameters())), "not as many weights as the file has")
    holds(all(bool(p.numel()) for p in model.parameters()), "a weight of no size")
    embedding = gguf.dequantize(file["token_embd.weight"].data, file["token_embd.weight"].tensor_type).astype(np.float32)
    holds(bits(torch.from_numpy(embedding)) == bits(state["model.embed_tokens.weight"]), "not the file's embedding")
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 3, dtype=torch.long))


# ---- folders in 4 bits ----------------------------------------------------------------------------------------------


@cache
def byte_tokenizer() -> Any:
    """tests/cli's, which is a fixture there."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special, letters = ["<|im_start|>", "<|im_end|>"], tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=260, initial_alphabet=letters, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator([sentences(4)], trainer)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.chat_template = CHAT_TEMPLATE
    return made


def dense(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    facts = {"num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": True, "initializer_range": 0.2}
    config = transformers.LlamaConfig(**sizes, **facts, vocab_size=len(byte_tokenizer()), eos_token_id=1, bos_token_id=None)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def quantised_samples() -> list[Files]:
    def make(folder: Path) -> None:
        with_output = main(["quantize", "--model", str(dense(folder / "d")), "--out", str(folder / "q")])
        holds(with_output == 0, "peftk quantize failed")

    stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        whole = written(make)
    finally:
        sys.stdout = stdout
    kept = ("q/config.json", "q/model.safetensors", "q/generation_config.json")
    return [{name: content for name, content in whole.items() if name in kept}]


def with_tokenizer(folder: Path) -> Path:
    byte_tokenizer().save_pretrained(folder)
    return folder


def load_quantised(folder: Path) -> nn.Module:
    return open_model(str(with_tokenizer(folder / "q")))[0]


def check_quantised(model: nn.Module, folder: Path) -> None:
    from safetensors.torch import load_file

    file = load_file(folder / "q" / "model.safetensors")
    state = model.state_dict()
    for name, tensor in file.items():
        if ".quant_state." not in name:
            holds(bits(state[name])[2] == bits(tensor)[2], f"{name}: not the file's")
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 3, dtype=torch.long))


def load_ours(folder: Path) -> nn.Module:
    return from_bitsandbytes(folder / "q")


# ---- CTranslate2 ----------------------------------------------------------------------------------------------------


def whisper_samples() -> list[Files]:
    def make(folder: Path) -> None:
        (folder / "ct2").mkdir()
        write_tokenizer(folder / "ct2")
        write(folder / "ct2" / "model.bin", ct2_arrays(small_whisper(300).half()))
        (folder / "ct2" / "config.json").write_text('{"suppress_ids": [9], "suppress_ids_begin": [8]}')

    return [{n: c for n, c in written(make).items() if not n.endswith("tokenizer.json")}]


def load_whisper(folder: Path) -> Any:
    (folder / "ct2").mkdir(exist_ok=True)
    (folder / "ct2" / "tokenizer.json").write_bytes(_whisper_tokenizer())
    return open_whisper(folder / "ct2")


@cache
def _whisper_tokenizer() -> bytes:
    return written(write_tokenizer)["tokenizer.json"]


def check_whisper(found: Any, folder: Path) -> None:
    model, _ = found
    with torch.no_grad():
        features = torch.zeros(1, model.config.num_mel_bins, 2 * model.config.max_source_positions, dtype=model.dtype)
        model(input_features=features, decoder_input_ids=torch.zeros(1, 2, dtype=torch.long))


# ---- the program ----------------------------------------------------------------------------------------------------


@cache
def base_folder() -> Path:
    import tempfile

    return dense(Path(tempfile.mkdtemp()))


def generate_samples() -> list[Files]:
    model = transformers.AutoModelForCausalLM.from_pretrained(base_folder())
    adapter = written(
        lambda f: peftk.save_adapter(peftk.attach(model, peftk.LoraConfig(r=2, target_modules=["q_proj"])), f / "a")
    )
    settings = {"model": str(base_folder()), "method": "lora", "base": "dense", "task": "causal-lm", "dtype": "fp32"}
    run = {"peftk": "0.1.0", "settings": settings, "summary": {"steps": 3}}
    return [{**adapter, "a/run.json": json.dumps(run).encode()}]


class Ended(Exception):
    """The program's own refusal: one line on stderr, exit status 2."""


def load_generate(folder: Path) -> int:
    """Its own words go to stderr; argparse has no part in it."""
    import io

    said, stderr = io.StringIO(), sys.stderr
    sys.stderr = said
    try:
        status = main(["generate", "--adapter", str(folder / "a"), "--prompt", "the of", "--max-new-tokens", "1", "--greedy"])
    finally:
        sys.stderr = stderr
    lines = [line for line in said.getvalue().splitlines() if line.startswith("peftk generate: error:")]
    if status == 2:
        holds(len(lines) == 1, "no one line on stderr")
        raise Ended(lines[0])
    return status


FORMATS = (
    Format("prompt", 2, prompt_samples, load_prompt, lambda model, folder: check_adapter(model, llama(), run_llama)),
    Format("gguf", 1, gguf_samples, lambda folder: open_gguf(folder / "m.gguf"), check_gguf, (UserError,)),
    Format("quantised", 1, quantised_samples, load_quantised, check_quantised, (UserError,)),
    Format("bitsandbytes", 1, quantised_samples, load_ours, check_quantised, (Exception,)),  # transformers reads
    Format("whisper_ct2", 2, whisper_samples, load_whisper, check_whisper, (UserError,)),
    Format("generate", 1, generate_samples, load_generate, lambda status, _: holds(status == 0, f"status {status}"), (Ended,)),
)  # fmt: skip
