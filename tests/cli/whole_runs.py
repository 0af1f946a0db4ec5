"""A process that runs commands of peftk in children of its own: killed at some moment, or measured. Imports are paid for once.

python whole_runs.py kill OUT TIMES SEED -- COMMAND...    one JSON line: bytes of OUT by file, kills that hit a running child
python whole_runs.py peak -- COMMAND...                   one JSON line: peak memory above that of a process about to start
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import sys
import threading
import time
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401
import torch
import transformers  # noqa: F401
from tqdm import tqdm

from peftk.cli import main

LIMIT = 300  # seconds of a child; the machine may be busy


def child(command: list[str]) -> int:
    """Its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        tqdm.set_lock(threading.RLock())  # the inherited one is shared by processes: one that is killed would hold it for ever
        try:
            sys.stdout = open(os.devnull, "w")
            status = main(command)
        finally:
            os._exit(status)
    return pid


def ended(pid: int) -> int:
    """Exit status; below 0 the signal. TimeoutError, and the process is killed, where it doesn't end."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"process {pid} did not end within {LIMIT} s")


def kill(out: Path, times: int, seed: int, command: list[str]) -> dict:
    """Kills spread over a whole run's time, each followed by another run that goes on; then one that may finish."""
    assert main(command) == 0  # here, so that the children find all loaded
    expected = tree(out)
    clear(out)
    start = time.monotonic()
    assert ended(child(command)) == 0
    whole = time.monotonic() - start
    assert tree(out) == expected
    draw, hits, finished = random.Random(seed), 0, 0
    clear(out)
    for _ in range(times):
        pid = child([*command, "--resume"])
        time.sleep(draw.uniform(0, whole))
        os.kill(pid, signal.SIGKILL)
        if ended(pid) == -signal.SIGKILL:
            hits += 1
        if out.exists():
            assert tree(out) == expected, "the folder isn't whole"
            assert ended(child([*command, "--resume"])) in (0, 2)
            clear(out)
            finished += 1
    if not out.exists():
        assert ended(child([*command, "--resume"])) == 0
    return {
        "same": tree(out) == expected,
        "hits": hits,
        "finished": finished,
        "left": sorted(p.name for p in out.parent.iterdir()),
    }


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def clear(out: Path) -> None:
    for path in sorted(out.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    out.rmdir()


def peaks(commands: list[list[str]]) -> list[int]:
    """In this process; each measured command after a run of another one, which loads what it needs beside its weights."""
    found = []
    for warm, command in zip(commands[::2], commands[1::2], strict=True):
        assert main(warm) == 0
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        assert main(command) == 0
        found.append(resident("VmHWM") - before)
    return found


def resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    at = sys.argv.index("--")
    if sys.argv[1] == "kill":
        told = kill(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[at + 1 :])
    else:
        text = "\n".join(sys.argv[at + 1 :])
        told = peaks([command.split("\n") for command in text.split("\n--\n")])
    print(json.dumps(told))
