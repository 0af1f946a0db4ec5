"""Checkpoints from which a killed run goes on exactly: adapter, optimizer, random generators, position, losses so far."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftk
from peftk.atomic import write_folder
from peftk.cli.errors import UserError
from peftk.cli.output import CHECKPOINTS
from peftk.cli.training import Progress, Row

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
        torch.save(
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
            unfinished / STATE,
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
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle raise whatever the reader stumbles over
        raise UserError(
            f"--resume: {path} can't be read: start anew with --overwrite ({type(error).__name__}: {error})"
        ) from error
    optimizer.load_state_dict(state["optimizer"])
    if schedule is not None:
        schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["random"])
    if state["random_cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["random_cuda"])
    return Progress(state["step"], [Row(**row) for row in state["rows"]], state["processed"], state["seconds"])
