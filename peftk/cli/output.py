"""The folder of a run: what may be written where, settings, losses, the picture.

run.json                  settings, and the summary once the run is done
loss.csv, loss.png        one row a step; written as training goes, drawn at its end
checkpoints/step-000050   the latest point to resume from; gone once the run is done
adapter_config.json, adapter_model.safetensors    the adapter, once the run is done
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peftk.atomic import remove_unfinished, write_file
from peftk.checkpoint import ENCODER
from peftk.cli.errors import UserError
from peftk.cli.training import Row
from peftk.files import read_json

logger = logging.getLogger("peftk.cli")

SETTINGS, LOSSES, PICTURE, CHECKPOINTS = "run.json", "loss.csv", "loss.png", "checkpoints"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # HF peft's names; the weights come last
_COLUMNS = [field.name for field in fields(Row) if field.name != "metrics"]
_UNPUBLISHED = "adapter.saved"
_OWN_FILES = (SETTINGS, LOSSES, PICTURE, *ADAPTER_FILES, ENCODER)


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Make sure that a run may write here: the folder is new or empty, holds a run to resume, or may be overwritten. Changes
    nothing. UserError says which flag would help."""
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other: give one")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: exists and is not a folder: give another name")
    if not folder.is_dir() or not any(folder.iterdir()) or overwrite:
        return
    if not resume:
        raise UserError(f"--out {folder}: the folder is not empty; --resume goes on with its run, --overwrite starts anew")
    if not (folder / SETTINGS).is_file():
        raise UserError(
            f"--resume: {folder} holds no {SETTINGS}, so it is not the folder of a run: give --out of the run that was stopped"
        )


@contextlib.contextmanager
def claimed(folder: Path, overwrite: bool) -> Iterator[None]:
    """Make the folder, and be its only run inside the ``with``; ``overwrite`` removes an earlier run's files and nothing else.
    UserError where it can't be made or written to, or another run is at work there; other errors pass."""
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: can't be made ({error.strerror}): give another folder") from error
    with _only_run(folder):
        if overwrite:
            for name in (CHECKPOINTS, _UNPUBLISHED):
                shutil.rmtree(folder / name, ignore_errors=True)
            for name in _OWN_FILES:
                (folder / name).unlink(missing_ok=True)
        try:
            for name in (*_OWN_FILES, _UNPUBLISHED):
                remove_unfinished(folder / name)
            yield
        except OSError as error:
            if not _is_about(folder, error):
                raise
            if is_new and not any(folder.iterdir()):
                folder.rmdir()
                raise UserError(f"--out {folder}: {error}; nothing is there") from error
            raise UserError(f"--out {folder}: {error}; --resume goes on from the last checkpoint") from error


def _is_about(folder: Path, error: OSError) -> bool:
    """Whether it is the folder's disk that said no, or something in the folder: nothing else of a run is the folder's fault."""
    in_folder = error.filename is not None and Path(os.fsdecode(error.filename)).resolve().is_relative_to(folder.resolve())
    return in_folder or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def _only_run(folder: Path) -> Iterator[None]:
    """A lock on the folder itself: it leaves no file, and goes with the process however that ends."""
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"--out {folder}: another run is at work there; wait for it, or give another folder") from None
    except OSError as error:  # NFS locks no folders
        logger.warning("%s can't be locked (%s): make sure that no other run writes there", folder, error.strerror)
    try:
        yield
    finally:
        os.close(handle)


def read_run(folder: Path) -> dict[str, Any] | None:
    """The run.json of a folder, None where it has none. UserError where it can't be read or isn't one."""
    path = folder / SETTINGS
    if not path.is_file():
        return None
    try:
        run = read_json(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not isinstance(run, dict) or not isinstance(run.get("settings"), dict):
        got = ", ".join(map(str, run)) if isinstance(run, dict) else type(run).__name__
        raise UserError(f"{path}: expected a run with its settings, got {got or 'nothing'}")
    labels = run.get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{path}: labels: expected the names of classes, got {labels!r:.200}")
    return run


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Write run.json whole."""
    write_file(folder / SETTINGS, (json.dumps(run, indent=2) + "\n").encode())


def check_same_settings(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """UserError with every flag whose value differs from that of the run to resume."""
    names = [*before, *(name for name in now if name not in before)]
    changed = [name for name in names if before.get(name) != now.get(name)]
    if changed:
        told = "; ".join(f"--{name.replace('_', '-')} was {before.get(name)}, now {now.get(name)}" for name in changed)
        raise UserError(f"--resume: the run in {folder} had other settings: {told}: give the same, or another --out")


class LossFile:
    """loss.csv: a header, the rows so far, then a line for each new row as it comes."""

    def __init__(self, folder: Path, rows: Sequence[Row], metrics: Sequence[str] = ()):
        self.metrics = metrics
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*_COLUMNS, *(f"eval_{name}" for name in metrics)])
        writer.writerows(map(self._cells, rows))
        write_file(folder / LOSSES, text.getvalue().encode())
        self._file = open(folder / LOSSES, "a", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")

    def append(self, row: Row) -> None:
        """Write one row through to the file."""
        self._writer.writerow(self._cells(row))
        self._file.flush()

    def _cells(self, row: Row) -> list[Any]:
        return [*(getattr(row, name) for name in _COLUMNS), *(row.metrics.get(name) for name in self.metrics)]

    def close(self) -> None:
        self._file.close()


def draw_losses(folder: Path, rows: Sequence[Row], title: str, unit: str = "token") -> None:
    """loss.png: training and held-out loss over the steps. Without matplotlib one log line instead."""
    if find_spec("matplotlib") is None:
        logger.warning("no %s: matplotlib is not installed (pip install 'peftk[plot]')", PICTURE)
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, label, marker in (("loss", "training (mean of a step)", ""), ("eval_loss", "held out", "o")):
        points = [(row.step, getattr(row, name)) for row in rows if getattr(row, name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, alpha=1.0 if marker else 0.6)
    axes.set(xlabel="step", ylabel=f"loss (nats a {unit})", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    write_file(folder / PICTURE, picture.getvalue())


def publish_adapter(folder: Path, save: Callable[[Path], None]) -> None:
    """Let ``save`` write the adapter's files aside, then move each of them whole into the run's folder."""
    aside = folder / _UNPUBLISHED
    shutil.rmtree(aside, ignore_errors=True)
    save(aside)
    for name in (ENCODER, *ADAPTER_FILES):
        if name in ADAPTER_FILES or (aside / name).exists():
            os.replace(aside / name, folder / name)
    shutil.rmtree(aside)
