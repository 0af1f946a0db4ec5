"""peftk generate: what a model says, with an adapter or without: text to a prompt or a recording, a class, tags."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import peftk
from peftk.cli import adapters, flags, output
from peftk.cli.errors import UserError
from peftk.cli.models import DTYPES, MODEL_HELP, open_for, resolve_device, resolve_dtype
from peftk.cli.prepare import for_generation, kept_dense, prepare_base
from peftk.cli.tasks import TASKS
from peftk.files import read_json

SUMMARY = "write text, or judge one, with a model and an adapter"
DESCRIPTION = (
    "Continues a prompt, answers a text or a recording, or tells the class of a text or the tags of its words: what the adapter"
    " was trained for. With an adapter that 'peftk finetune' wrote, model, task, base and dtype are those of its run unless given"
    " here."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of ``peftk generate``."""
    parser.add_argument("--model", default=None, metavar="M", help=f"{MODEL_HELP}; the adapter's by default")
    parser.add_argument("--adapter", type=Path, default=None, metavar="DIR", help="what 'peftk finetune --out' wrote")
    parser.add_argument("--task", choices=TASKS, default=None, help="the adapter's by default, else causal-lm")
    parser.add_argument("--prompt", default=None, help="text to continue, to answer or to judge")
    parser.add_argument("--pair", default=None, help="classification: the second text, where the classes are of two")
    parser.add_argument(
        "--audio", type=Path, default=None, metavar="FILE", help="seq2seq: a recording (.wav) in place of a prompt"
    )
    parser.add_argument("--chat", action="store_true", help="put the prompt as a user's turn through the chat template")
    parser.add_argument("--max-new-tokens", type=flags.positive_int, default=100, help="stop after so many")
    parser.add_argument("--temperature", type=flags.positive_float, default=0.8, help="below 1 plays safer")
    parser.add_argument("--top-p", type=flags.share_above_0, default=0.95, help="draw from the likeliest tokens of this share")
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--seed", type=flags.seed, default=0, help="of the draws")
    parser.add_argument("--base", choices=adapters.BASES, default=None, help="the adapter's by default, else dense")
    parser.add_argument("--head", choices=adapters.BASES, default="dense", help="of the logits: nf4 is faster and less exact")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default=None, help="the adapter's by default, else auto")
    parser.add_argument("--threads", type=flags.positive_int, default=None, help="CPU threads; torch's choice by default")


def run(arguments: argparse.Namespace) -> None:
    """Print the prompt and its continuation; with --chat the answer alone."""
    saved = _adapter_run(arguments.adapter)
    settings = saved.get("settings", {})
    name = arguments.model or settings.get("model")
    if name is None:
        raise UserError("--model is needed: there is no adapter whose run.json names one")
    task_name = arguments.task or settings.get("task", "causal-lm")
    task = TASKS[task_name]
    _check_input(arguments, task_name)
    if task.labels and "labels" not in saved:
        raise UserError(f"--task {task_name}: needs an --adapter of such a run, whose run.json names the classes")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype or settings.get("dtype", "auto"), device)
    opened = open_for(task.task_type, name, saved.get("labels"))
    prepare_base(opened.model, arguments.base or _base_of(settings), dtype, device, _kept(arguments.adapter, task.task_type))
    if arguments.adapter:
        try:
            peftk.load_adapter(opened.model, arguments.adapter)
        except (ValueError, OSError) as error:
            raise UserError(f"--adapter {arguments.adapter}: {error}") from error
    torch.manual_seed(arguments.seed)
    try:
        for_generation(opened.model, arguments.head)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    print(task.answer(opened.model, opened.tokenizer, arguments))


def _check_input(arguments: argparse.Namespace, task: str) -> None:
    """What a task can't take is refused, not ignored."""
    if arguments.audio is not None and task != "seq2seq":
        raise UserError(f"--audio: is for --task seq2seq, not {task}: leave it out")
    if arguments.pair is not None and task != "classification":
        raise UserError(f"--pair: is for --task classification, not {task}: leave it out")
    if arguments.chat and task != "causal-lm":
        raise UserError(f"--chat: is for --task causal-lm, not {task}: leave it out")
    if (arguments.prompt is None) == (arguments.audio is None):
        raise UserError("--prompt or --audio is needed, and not both")
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise UserError("--prompt: expected at least one token, got none")


def _base_of(settings: dict[str, Any]) -> str:
    """Of a run, what its base was held in; dense without one."""
    return settings.get("base") or ("nf4" if settings.get("method") == "qlora" else "dense")


def _kept(adapter: Path | None, task_type: str) -> tuple[str, ...]:
    """What the adapter brings whole."""
    if adapter is None:
        return ()
    path = adapter / output.ADAPTER_FILES[0]
    try:
        config = read_json(path)
    except ValueError as error:
        raise UserError(f"--adapter {adapter}: {error}") from error
    whole = config.get("modules_to_save") if isinstance(config, dict) else config
    if whole is not None and not (isinstance(whole, list) and all(isinstance(name, str) for name in whole)):
        raise UserError(f"--adapter {adapter}: {path}: modules_to_save: expected a list of names, got {whole!r:.200}")
    return kept_dense(task_type, whole or ())


def _adapter_run(folder: Path | None) -> dict[str, Any]:
    """The run.json of the run that wrote the adapter; empty without one, or where another program wrote it."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise UserError(f"--adapter {folder}: no such folder; expected --out of peftk finetune")
    if not (folder / output.ADAPTER_FILES[0]).is_file():
        unfinished = " (its run is not finished: peftk finetune --resume)" if (folder / output.SETTINGS).is_file() else ""
        raise UserError(
            f"--adapter {folder}: holds no {output.ADAPTER_FILES[0]}{unfinished}; expected the folder of a finished run"
        )
    run = output.read_run(folder) or {}
    known = {"task": TASKS, "base": adapters.BASES, "dtype": ("auto", *DTYPES)}
    for name, value in run.get("settings", {}).items():
        if name in known and value is not None and (not isinstance(value, str) or value not in known[name]):
            raise UserError(
                f"--adapter {folder}: {output.SETTINGS}: {name}: expected {', '.join(known[name])}, got {value!r:.200}"
            )
        if name == "model" and not isinstance(value, str):
            raise UserError(f"--adapter {folder}: {output.SETTINGS}: model: expected a name, got {value!r:.200}")
    return run
