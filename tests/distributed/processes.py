"""Programs run by several processes on this machine, over gloo: fork servers that have imported everything, results by file.

A rank ends at the first program that fails; others then fail in their next collective. What counts is what ranks have written:
their exit codes don't, since about one torch process in four aborts in a destructor when all results are right.
"""

from __future__ import annotations

import datetime
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

PROGRAMS = "distributed.programs"
LIMIT = 420  # seconds for all programs of a call; the machine may be busy with other tests


def run(ranks: int, *programs: str | tuple[str, dict[str, Any]]) -> dict[str, list[Any]]:
    """By program, a function of programs.py, what it returned in each of ``ranks`` processes. AssertionError with the tracebacks
    where one failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PROGRAMS])
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_rank, args=(rank, ranks, programs, folder), daemon=True) for rank in range(ranks)]
        _start(processes)
        deadline = time.monotonic() + LIMIT
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
            process.kill()
        return _collect(Path(folder), ranks, [_name(program) for program in programs])


def _start(processes: list) -> None:
    """The fork server, started with the first one, finds what to import by PYTHONPATH alone."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        for process in processes:
            process.start()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def _name(program: str | tuple[str, dict[str, Any]]) -> str:
    return program if isinstance(program, str) else program[0]


def _collect(folder: Path, ranks: int, names: list[str]) -> dict[str, list[Any]]:
    import torch

    if failed := sorted(folder.glob("failed-*")):
        raise AssertionError("\n\n".join(f"{path.name}\n{path.read_text()}" for path in failed))
    lacking = [f"{name}, rank {rank}" for name in names for rank in range(ranks) if not (folder / f"{name}-{rank}").exists()]
    assert not lacking, f"no results within {LIMIT} s of {'; '.join(lacking)}"
    return {name: [torch.load(folder / f"{name}-{rank}", weights_only=False) for rank in range(ranks)] for name in names}


def _rank(rank: int, ranks: int, programs: tuple, folder: str) -> None:
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=LIMIT)
    )
    module = importlib.import_module(PROGRAMS)
    for program in programs:
        name = _name(program)
        try:
            result = getattr(module, name)(**({} if isinstance(program, str) else program[1]))
        except BaseException:
            (Path(folder) / f"failed-{name}-{rank}").write_text(traceback.format_exc())
            os._exit(1)
        torch.save(result, Path(folder) / f"{name}-{rank}.new")
        (Path(folder) / f"{name}-{rank}.new").rename(Path(folder) / f"{name}-{rank}")
    torch.distributed.barrier()
    os._exit(0)
