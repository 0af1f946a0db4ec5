"""bench/layers/bench_memory.py: what counts as extra memory."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.layers import bench_memory
from bench.limits import Limits

MB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(1, 1, 1, {})
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")


@pytest.mark.parametrize("scratch", [0, 64])
def test_scratch_counts_and_results_do_not(scratch: int):
    program = f"""
import torch
from bench.layers import bench_memory

def run():
    torch.ones({scratch * MB}, dtype=torch.uint8)
    return (torch.ones({32 * MB}, dtype=torch.uint8),)

torch.ones({256 * MB}, dtype=torch.uint8)  # an earlier peak, which must not count
print(bench_memory.peak_beyond_results(run))
"""  # in a process of its own: one that `peftk finetune` has told to keep freed memory gives none back
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert abs(int(done.stdout) - scratch * MB + min(scratch, 32) * MB) < 4 * MB


def test_a_process_of_its_own():
    (taken,) = bench_memory.extra_bytes("peftk", 128, processes=1)
    assert abs(taken) < bench_memory.MOST
    with pytest.raises(RuntimeError, match="memory of nobody: KeyError: 'nobody'"):
        bench_memory.extra_bytes("nobody", 128, processes=1)


@pytest.mark.parametrize(("taken", "met"), [(7_999_999, True), (8_000_000, False)])
def test_the_verdict(monkeypatch: pytest.MonkeyPatch, taken: int, met: bool):
    monkeypatch.setattr(bench_memory, "extra_bytes", lambda who, size: [taken, taken - 2, taken + 2])
    monkeypatch.setattr(bench_memory.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    ((ours, on_bitsandbytes, on_dense),) = bench_memory.rows(128, 1, LIMITS)
    assert (ours.who, ours.extra, ours.verdicts[0].met) == ("peftk", taken, met)
    assert (ours.rounds, ours.extra_spread) == (3, (taken - 2, taken + 2))
    assert on_bitsandbytes.extra is None and on_bitsandbytes.note == "bitsandbytes not installed"
    assert on_dense.extra == taken
