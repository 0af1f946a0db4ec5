"""peftk quantize: a model folder whose linear layers are in 4 bits, in bitsandbytes' form."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import peftk
from peftk.atomic import write_folder
from peftk.cli.errors import UserError
from peftk.cli.models import DTYPES, MODEL_HELP, open_model
from peftk.cli.prepare import quantise_base
from peftk.cli.process_memory import readable
from peftk.nn import NF4Linear

SUMMARY = "store a model with its linear layers in 4 bits"
DESCRIPTION = (
    "Writes a folder in Hugging Face's format: NF4 weights with double quantisation under bitsandbytes' keys, which transformers"
    " with bitsandbytes reads, and --model of the other commands."
)
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of ``peftk quantize``."""
    parser.add_argument("--model", required=True, metavar="M", help=MODEL_HELP)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--dtype",
        choices=("stored", *DTYPES),
        default="stored",
        help="of what stays dense, and the one that 4-bit weights decode to",
    )


def run(arguments: argparse.Namespace) -> None:
    """Quantise and write the folder whole."""
    out: Path = arguments.out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: expected a new folder, this one holds something")
    model, tokenizer = open_model(arguments.model)
    if any(isinstance(module, NF4Linear) for module in model.modules()):
        raise UserError(f"--model {arguments.model}: is in 4 bits already: give the dense model")
    if arguments.dtype != "stored":
        model.to(DTYPES[arguments.dtype])
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    quantise_base(model, progress=True, with_experts=False)
    if not any(isinstance(module, NF4Linear) for module in model.modules()):
        raise UserError(f"--model {arguments.model}: {type(model).__name__} has no linear layer to quantise: give another model")
    with write_folder(out) as folder:
        write_quantised(model, tokenizer, folder)
    print(f"{out}: {readable(before)} -> {readable(peftk.report(model).total.bytes)}")


def write_quantised(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """config.json with its quantization_config, model.safetensors with bitsandbytes' keys, the tokenizer's files."""
    save_file(_without_aliases(model.state_dict()), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(folder.stat().st_mode & 0o666)  # safetensors lets nobody else read
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(model)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """transformers' BitsAndBytesConfig as it stands in config.json."""
    first = next(module for module in model.modules() if isinstance(module, NF4Linear))
    dense = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not isinstance(module, NF4Linear)
    ]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": first.quant_type,
        "bnb_4bit_use_double_quant": first.double_quant,
        "bnb_4bit_compute_dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense,
    }


def _without_aliases(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor once: a tied head shares its embedding's memory, and transformers ties them again on loading."""
    kept: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        kept[name] = tensor.contiguous()
    return kept
