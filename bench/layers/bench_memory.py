"""Memory that a forward and backward of a QLoRA layer takes beyond its inputs and results, m = 128, bf16.

Each candidate in a process of its own, on its second step: what the first one freed is given back to the system, the kernel's
high-water mark of resident memory is set back, and what it rises by, less y, dx, dA and dB, is the figure; the median of
PROCESSES of them. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from bench.goals import Verdict
from bench.limits import Limits
from bench.linear import RANK, Layer, Step, training_runs
from bench.measure import Row, percentile
from bench.peers import Run

TESTS = ("tests/ops/test_nf4_lora_linear.py",)
ROWS, PROCESSES = 128, 3
MOST = 8_000_000  # bytes
PEERS = {"HF peft on bitsandbytes": ("peft", "bitsandbytes"), "HF peft on dense bf16": ("peft",)}
HEADLINE = "m=128"


def rows(size: int, repeat: int, limits: Limits) -> Iterator[list[Row]]:
    """One case."""
    name = f"m={ROWS}, bf16, {size}x{size}, r={RANK}, forward + backward, extra memory"
    ours = _row(name, "peftk", extra_bytes("peftk", size))
    verdict = Verdict(f"< {MOST / 1e6:g} MB", f"{ours.extra / 1e6:.1f} MB", ours.extra < MOST)
    found = [replace(ours, verdicts=(verdict,))]
    for who, packages in PEERS.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            found.append(Row(name, who, note=f"{missing[0]} not installed"))
        else:
            found.append(_row(name, who, extra_bytes(who, size)))
    yield found


def _row(name: str, who: str, found: list[int]) -> Row:
    spread = percentile(found, 0.1), percentile(found, 0.9)
    return Row(name, who, rounds=len(found), extra=int(statistics.median(found)), extra_spread=spread)


def extra_bytes(who: str, size: int, processes: int = PROCESSES) -> list[int]:
    """Of a candidate by its name, one a process; RuntimeError with what its process said where it fails."""
    if not Path("/proc/self/clear_refs").exists():
        raise RuntimeError("the peak of memory is read from Linux's /proc/self, which isn't here")
    root = Path(__file__).resolve().parents[2]
    found = []
    for _ in range(processes):
        command = [sys.executable, "-m", "bench.layers.bench_memory", who, str(size), str(torch.get_num_threads())]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise RuntimeError(f"memory of {who}: {said[-1]}")
        found.append(int(done.stdout.split()[-1]))
    return found


def measure(who: str, size: int) -> int:
    """In this process."""
    layer = Layer.random(size, size, torch.bfloat16)
    run = training_runs(layer, Step.random(ROWS, size, size, torch.bfloat16))[who]()
    return peak_beyond_results(run)


def peak_beyond_results(run: Run) -> int:
    """Bytes by which the resident memory rises while ``run``, called for the second time, makes its tuple of tensors, less
    their own."""
    run()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    results = run()
    return _status("VmHWM") - before - sum(result.nbytes for result in results)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(measure(sys.argv[1], int(sys.argv[2])))
