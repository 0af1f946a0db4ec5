"""Checkpoints from which a killed run goes on exactly: adapter, optimizer, random generators, position, losses so far."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftk
from peftk.atomic import write_folder
from peftk.cli.errors import UserError
from peftk.cli.output import CHECKPOINTS
from peftk.cli.training import Progress, Row
from peftk.files import read_torch, write_torch
from peftk.optim.layouts import from_any
from peftk.optim.moments import AVERAGE, SQUARE

ADAPTER, STATE = "adapter", "training.pt"


def save_checkpoint(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, schedule: Any = None
) -> Path:
    """Write ``out``/checkpoints/step-NNNNNN whole, then remove the one before; returns the folder. ``schedule``: what works in
    each of the optimizer's steps (AdaLoRA's budget), with a ``state_dict``."""
    folder = out / CHECKPOINTS / f"step-{progress.step:06d}"
    folder.parent.mkdir(exist_ok=True)
    with write_folder(folder) as unfinished:
        peftk.save_adapter(model, unfinished / ADAPTER)
        write_torch(
            unfinished / STATE,
            {
                "optimizer": optimizer.state_dict(),
                "schedule": None if schedule is None else schedule.state_dict(),
                "random": torch.get_rng_state(),
                "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                "step": progress.step,
                "processed": progress.processed,
                "seconds": progress.seconds,
                "rows": [vars(row) for row in progress.rows],
            },
        )
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other)
    return folder


def latest_checkpoint(out: Path) -> Path | None:
    """The checkpoint with the highest step; None where there is none."""
    folder = out / CHECKPOINTS
    whole = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)] if folder.is_dir() else []
    return max(whole, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def restore(checkpoint: Path, optimizer: torch.optim.Optimizer, schedule: Any = None) -> Progress:
    """Put back the state of the optimizer, the schedule and the random generators; returns the position. The adapter is loaded
    before, since the optimizer is made of its parameters. UserError where the file can't be read."""
    path = checkpoint / STATE
    try:
        state = read_torch(path)
        _check_state(state, optimizer)
        optimizer.load_state_dict(state["optimizer"])
        if schedule is not None:
            schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])
        return Progress(state["step"], [Row(**row) for row in state["rows"]], state["processed"], state["seconds"])
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        told = str(error).removeprefix(f"{path}: ")
        raise UserError(f"--resume: {path} can't be read: start anew with --overwrite ({told})") from error


_NUMBERS = {"step": int, "processed": int, "seconds": float}
_PARTS = {"optimizer", "schedule", "random", "random_cuda", "rows", *_NUMBERS}


def _check_state(state: Any, optimizer: torch.optim.Optimizer) -> None:
    """ValueError for what this program doesn't write; torch's own optimizer takes any state, and fails in a later step."""
    if not isinstance(state, dict) or set(state) != _PARTS:
        got = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"expected {', '.join(sorted(_PARTS))}, got {got}")
    for name, kind in _NUMBERS.items():
        if not isinstance(state[name], kind) or isinstance(state[name], bool) or not 0 <= state[name] < 2**53:
            raise ValueError(f"{name}: expected a number, got {state[name]!r:.200}")
    if not isinstance(state["rows"], list) or not all(isinstance(row, dict) and _is_row(row) for row in state["rows"]):
        raise ValueError(f"rows: expected those of {', '.join(_ROW)}, got {state['rows']!r:.200}")
    if not isinstance(state["random"], torch.Tensor) or not isinstance(state["random_cuda"], list):
        raise ValueError(f"random: expected a generator's state, got {state['random']!r:.200}")
    _check_moments(state["optimizer"], optimizer)


_ROW = {field.name: field.type for field in fields(Row)}


def _is_row(row: dict[str, Any]) -> bool:
    numbers = {name: value for name, value in row.items() if name != "metrics"}
    metrics = row.get("metrics")
    return (
        row.keys() == _ROW.keys()
        and all(isinstance(numbers[name], int) for name in ("step", "tokens"))
        and all(value is None or isinstance(value, int | float) for value in numbers.values())
        and isinstance(metrics, dict)
        and all(isinstance(name, str) and isinstance(value, int | float) for name, value in metrics.items())
    )


def _check_moments(state: Any, optimizer: torch.optim.AdamW) -> None:
    """One group with the options that the optimizer has, and of each parameter a step and moments of its shape."""
    from_any(state, (AVERAGE, SQUARE))
    (own,), groups = optimizer.param_groups, state["param_groups"]
    if len(groups) != 1 or groups[0].keys() != own.keys() or not all(_alike(groups[0][name], own[name]) for name in own):
        raise ValueError(f"optimizer: expected one group with {', '.join(own)}, got {groups!r:.200}")
    if groups[0]["params"] != list(range(len(own["params"]))):
        raise ValueError(f"optimizer: expected {len(own['params'])} parameters, got {groups[0]['params']!r:.200}")
    for at, moments in state["state"].items():
        shape = own["params"][at].shape
        for name in ("step", "exp_avg", "exp_avg_sq"):
            wanted, got = (() if name == "step" else tuple(shape)), moments.get(name)
            if not isinstance(got, torch.Tensor) or tuple(got.shape) != wanted:
                raise ValueError(f"optimizer: state {at}: {name}: expected a tensor of shape {wanted}, got {got!r:.200}")


def _alike(theirs: Any, ours: Any) -> bool:
    """A finite number, 0 or more, for a number; anything else as it is. ``params`` are looked at for themselves."""
    if isinstance(ours, list):
        return isinstance(theirs, list)
    if isinstance(ours, tuple):
        return isinstance(theirs, list | tuple) and len(theirs) == len(ours) and all(map(_alike, theirs, ours))
    if isinstance(ours, float):
        return isinstance(theirs, float) and 0 <= theirs < math.inf
    return theirs == ours if isinstance(theirs, type(ours)) else False
