"""Language modelling as a task: texts and conversations in packed sequences, and a prompt that is gone on with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftk.cli.data import read_documents
from peftk.cli.errors import UserError
from peftk.cli.packing import Sequences, split_and_pack


def encode(
    paths: Sequence[Path], tokenizer: Any, model: nn.Module, length: int, eval_fraction: float, seed: int
) -> tuple[Sequences, Sequences]:
    """(training, held-out) sequences of ``length`` tokens from the files."""
    documents = read_documents(paths, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return split_and_pack(documents, length, eval_fraction, seed, pad)


@torch.inference_mode()
def answer(model: nn.Module, tokenizer: Any, arguments: argparse.Namespace) -> str:
    """The prompt and its continuation; with --chat what the model answers alone."""
    if arguments.chat:
        if tokenizer.chat_template is None:
            raise UserError("--chat: the model's tokenizer has no chat template: leave --chat out")
        turns = [{"role": "user", "content": arguments.prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
    else:
        inputs = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
    if not inputs.input_ids.numel():
        raise UserError("--prompt: expected at least one token, got none")
    tokens = model.generate(
        input_ids=inputs.input_ids.long(),
        attention_mask=inputs.attention_mask,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **drawing(arguments),
    )[0]
    start = inputs.input_ids.shape[1] if arguments.chat else 0
    return tokenizer.decode(tokens[start:], skip_special_tokens=True)


def drawing(arguments: argparse.Namespace) -> dict[str, Any]:
    """How tokens are drawn, as transformers' ``generate`` takes it."""
    length = {"max_new_tokens": arguments.max_new_tokens, "do_sample": not arguments.greedy}
    return length if arguments.greedy else {**length, "temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
