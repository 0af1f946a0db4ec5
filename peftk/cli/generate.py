"""peftk generate: text from a model, with an adapter or without."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import peftk
from peftk.cli import flags, output
from peftk.cli.errors import UserError
from peftk.cli.models import DTYPES, MODEL_HELP, open_model, resolve_device, resolve_dtype
from peftk.cli.prepare import METHODS, prepare_base

SUMMARY = "write text with a model and an adapter"
DESCRIPTION = (
    "Continues a prompt. With an adapter that 'peftk finetune' wrote, model, method and dtype are those of its run unless"
    " given here."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of ``peftk generate``."""
    parser.add_argument("--model", default=None, metavar="M", help=f"{MODEL_HELP}; the adapter's by default")
    parser.add_argument("--adapter", type=Path, default=None, metavar="DIR", help="what 'peftk finetune --out' wrote")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--chat", action="store_true", help="put the prompt as a user's turn through the chat template")
    parser.add_argument("--max-new-tokens", type=flags.positive_int, default=100, help="stop after so many")
    parser.add_argument("--temperature", type=flags.positive_float, default=0.8, help="below 1 plays safer")
    parser.add_argument("--top-p", type=flags.share_above_0, default=0.95, help="draw from the likeliest tokens of this share")
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--seed", type=flags.seed, default=0, help="of the draws")
    parser.add_argument("--method", choices=METHODS, default=None, help="4-bit base or not; the adapter's by default, else lora")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default=None, help="the adapter's by default, else auto")
    parser.add_argument("--threads", type=flags.positive_int, default=None, help="CPU threads; torch's choice by default")


def run(arguments: argparse.Namespace) -> None:
    """Print the prompt and its continuation; with --chat the answer alone."""
    saved = _adapter_settings(arguments.adapter)
    name = arguments.model or saved.get("model")
    if name is None:
        raise UserError("--model is needed: there is no adapter whose run.json names one")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype or saved.get("dtype", "auto"), device)
    model, tokenizer = open_model(name)
    prepare_base(model, arguments.method or saved.get("method", "lora"), dtype, device)
    if arguments.adapter:
        try:
            peftk.load_adapter(model, arguments.adapter)
        except (ValueError, OSError) as error:
            raise UserError(f"--adapter {arguments.adapter}: {error}") from error
    torch.manual_seed(arguments.seed)
    print(_continue(arguments, model.eval(), tokenizer, device))


def _adapter_settings(folder: Path | None) -> dict[str, Any]:
    """The settings of the run that wrote the adapter; empty without one, or where another program wrote it."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise UserError(f"--adapter {folder}: no such folder")
    if not (folder / output.ADAPTER_FILES[0]).is_file():
        unfinished = " (its run is not finished: peftk finetune --resume)" if (folder / output.SETTINGS).is_file() else ""
        raise UserError(f"--adapter {folder}: holds no {output.ADAPTER_FILES[0]}{unfinished}")
    return (output.read_run(folder) or {}).get("settings", {})


@torch.inference_mode()
def _continue(arguments: argparse.Namespace, model: Any, tokenizer: Any, device: torch.device) -> str:
    if arguments.chat:
        if tokenizer.chat_template is None:
            raise UserError("--chat: the model's tokenizer has no chat template")
        turns = [{"role": "user", "content": arguments.prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(device)
    else:
        inputs = tokenizer(arguments.prompt, return_tensors="pt").to(device)
    if not inputs.input_ids.numel():
        raise UserError("--prompt: expected at least one token, got none")
    sampling = {} if arguments.greedy else {"temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
    tokens = model.generate(
        input_ids=inputs.input_ids.long(),
        attention_mask=inputs.attention_mask,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=not arguments.greedy,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )[0]
    start = inputs.input_ids.shape[1] if arguments.chat else 0
    return tokenizer.decode(tokens[start:], skip_special_tokens=True)
