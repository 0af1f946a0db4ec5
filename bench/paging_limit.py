"""python -m bench.paging_limit: full fine-tuning of SmolLM2-135M in fp32 under a limit on memory, with paged moments and without.

Each in a process of its own under the same limit: a memory cgroup where one can be made, else RLIMIT_DATA, which counts private
memory and leaves the mapped page file out. Without paging the moments, 1.08 GB, don't fit; with a budget of BUDGET they do.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.report import ROOT

LIMIT, BUDGET = 2600 << 20, 256 << 20  # bytes
STEPS, TOKENS = 4, 64
CGROUPS = Path("/sys/fs/cgroup")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=LIMIT, help="bytes a process may take")
    parser.add_argument("--rlimit", action="store_true", help="RLIMIT_DATA, also where a memory cgroup can be made")
    parser.add_argument("--budget", type=int, default=BUDGET, help="bytes of moments that may be resident")
    options = parser.parse_args()
    ends = {}
    for who, budget in (("unpaged", 0), ("paged", options.budget)):
        with contextlib.nullcontext() if options.rlimit else memory_cgroup(options.limit) as group:
            kind = "memory cgroup" if group else "RLIMIT_DATA"
            print(f"{who}, {kind} of {options.limit / 1e6:.0f} MB:", flush=True)
            command = [sys.executable, "-m", "bench.paging_limit_run", str(budget), str(STEPS), str(TOKENS)]
            ends[who] = subprocess.run(command, cwd=ROOT, preexec_fn=lambda g=group: enter(g, options.limit)).returncode
            print(f"  ended with {ends[who]}", flush=True)
    is_shown = ends["unpaged"] in (-signal.SIGKILL, errno.ENOMEM) and ends["paged"] == 0
    print("paging runs through where it is needed" if is_shown else "not shown: choose another --limit")
    return 0 if is_shown else 1


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Path | None]:
    """A new cgroup, version 1 or 2, with that limit, inside this process's own; None where none can be made."""
    own = dict(line.split(":")[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    version = 1 if "memory" in own else 2
    parent = CGROUPS / "memory" / own["memory"].strip("/") if version == 1 else CGROUPS / own.get("", "").strip("/")
    group: Path | None = parent / f"peftk-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if version == 1 else "memory.max")).write_text(str(limit))
    except OSError:
        if group.is_dir():
            group.rmdir()
        group = None
    try:
        yield group
    finally:
        if group is not None:
            group.rmdir()


def enter(group: Path | None, limit: int) -> None:
    """Put this process under the limit."""
    if group is None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    else:
        (group / "cgroup.procs").write_text(str(os.getpid()))


if __name__ == "__main__":
    sys.exit(main())
