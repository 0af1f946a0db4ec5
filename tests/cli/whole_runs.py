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
import time
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401
import torch
import transformers  # noqa: F401

from peftk.cli import main


def child(command: list[str]) -> int:
    """Its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            sys.stdout = open(os.devnull, "w")
            status = main(command)
        finally:
            os._exit(status)
    return pid


def ended(pid: int) -> int:
    """Exit status; below 0 the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(out: Path, times: int, seed: int, command: list[str]) -> dict:
    """Kills spread over a whole run's time, each followed by another run that goes on; then one that may finish."""
    start = time.monotonic()
    assert ended(child(command)) == 0
    whole = time.monotonic() - start
    expected = tree(out)
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


def peak(warm: list[str], command: list[str]) -> dict:
    """In this process, after one run of ``warm``, which loads what a command needs beside its weights."""
    assert main(warm) == 0
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    assert main(command) == 0
    return {"peak": resident("VmHWM") - before}


def resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    at = sys.argv.index("--")
    if sys.argv[1] == "kill":
        told = kill(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[at + 1 :])
    else:
        second = sys.argv.index("--", at + 1)
        told = peak(sys.argv[at + 1 : second], sys.argv[second + 1 :])
    print(json.dumps(told))
