"""What ``peftk quantize`` and ``peftk merge`` share: a new folder of a whole checkpoint, with its report."""

from __future__ import annotations

import argparse
import errno
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import peftk
from peftk.atomic import write_file
from peftk.cli import flags
from peftk.cli.errors import UserError
from peftk.cli.process_memory import readable, return_freed_memory
from peftk.cli.stored import CONFIG, StoredModel
from peftk.format.code4 import BLOCK_SIZES
from peftk.streaming import report
from peftk.streaming.outputs import Error
from peftk.streaming.plan import Planned
from peftk.streaming.source import fingerprint
from peftk.streaming.work import Busy, Job, check_free, into_shards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of both commands."""
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder; it appears whole, at the end")
    parser.add_argument(
        "--block-size", type=int, choices=BLOCK_SIZES, default=None, help="weights that share a constant; 64 by default"
    )
    parser.add_argument("--no-double-quant", action="store_true", help="constants in fp32: 0.37 bits more a weight")
    parser.add_argument(
        "--skip",
        nargs="+",
        default=[],
        metavar="NAME",
        help="layers that stay dense, by path or a part of it; the head always does",
    )
    parser.add_argument(
        "--max-shard-size",
        type=flags.size,
        default=None,
        metavar="SIZE",
        help="of a file, such as 5GB; the model's own files by default",
    )
    parser.add_argument(
        "--report", type=Path, default=None, metavar="CSV", help="the error of each layer; in the new folder by default"
    )
    parser.add_argument(
        "--plot", type=Path, default=None, metavar="PNG", help="how the errors spread; in the new folder by default"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with a killed run of the same settings; finished files are kept"
    )


@dataclass(frozen=True)
class Task:
    """``command``: quantize or merge; ``config``: config.json of the new checkpoint."""

    command: str
    arguments: argparse.Namespace
    model: StoredModel
    planned: Planned
    config: dict[str, Any]
    files: tuple[Path, ...]  # what is read
    settings: dict[str, Any]

    @property
    def out(self) -> Path:
        return self.arguments.out.resolve()

    def facts(self) -> dict[str, Any]:
        """What the folder is made of and how."""
        return {
            "command": self.command,
            "peftk": peftk.info().versions["peftk"],
            "inputs": fingerprint(self.files),
            **self.settings,
        }


def check_out(arguments: argparse.Namespace) -> None:
    """UserError, before the model is looked at, unless --out may be made."""
    try:
        check_free(arguments.out.resolve(), arguments.resume)
    except ValueError as error:
        raise UserError(f"--out {error}") from error
    for name in ("report", "plot"):
        path: Path | None = getattr(arguments, name)
        if path is not None and not path.resolve().parent.is_dir():
            raise UserError(f"--{name} {path}: no such folder, expected one that is there")


def in_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json that says so, under the name that it has for it."""
    name = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return {**config, name: str(dtype).removeprefix("torch.")}


def carry_out(task: Task) -> None:
    """Write the folder, and say what it came to. UserError for what the job can't be done with or on."""
    shards = into_shards(task.planned.groups, task.arguments.max_shard_size)
    return_freed_memory()
    facts = task.facts()

    def finish(folder: Path, errors: list[Error]) -> None:
        if task.facts() != facts:
            raise ValueError(f"--model {task.arguments.model}: a file has changed while it was read: start again")
        _finish(task, folder, errors)

    job = Job(task.out, shards, facts, finish, task.arguments.resume)
    before = sum(tensor.nbytes for tensor in task.model.source.tensors.values())
    try:
        errors = job.run({"quantize": "quantising", "merge": "merging"}[task.command])
    except Busy as error:
        raise UserError(f"--out {error}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        told = f"{error.strerror or error}" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else str(error)
        raise UserError(f"--out {task.out}: {told}; nothing is there, finished files wait for --resume") from error
    print(report.summary(errors))
    print(f"{task.out}: {readable(before)} -> {readable(sum((task.out / shard.name).stat().st_size for shard in shards))}")


def _finish(task: Task, folder: Path, errors: list[Error]) -> None:
    """All that is no weight: the config last of what others wrote, then the report."""
    task.model.write_rest(folder)
    write_file(folder / CONFIG, (json.dumps(task.config, indent=2) + "\n").encode())
    name = f"{task.command}_report"
    report.write_table(task.arguments.report or folder / f"{name}.csv", errors)
    report.draw(task.arguments.plot or folder / f"{name}.png", errors, f"peftk {task.command}: {len(errors)} layers")


def quantization_config(double_quant: bool, dtype: str, dense: Sequence[str]) -> dict[str, Any]:
    """transformers' BitsAndBytesConfig as it stands in config.json. ``dense``: paths of linear layers that are not in 4 bits."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(dense),
    }
