"""What a paged step takes beyond the moments that may be resident; a disk without room."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn

from peftk.optim import AdamW, PagedAdamW, PagedAdamW8bit, PagedAdEMAMix, PagedLion8bit

ROOT = Path(__file__).resolve().parents[2]
MOST = 16 << 20  # bytes
PEAK = """
import ctypes, gc, sys
from pathlib import Path
import torch
from torch import nn
from peftk import optim

kind, dtype, nonfinite, budget, folder = sys.argv[1:]
torch.set_num_threads(2)

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def made(shape):
    params = [nn.Parameter(torch.ones(shape, dtype=getattr(torch, dtype))) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    return getattr(optim, kind)(params, budget=int(budget), folder=folder, nonfinite=nonfinite)

made((256, 256)).step()
optimizer = made((1024, 4096))
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
for _ in range(3):
    optimizer.step()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc/self")
@pytest.mark.parametrize(
    ("kind", "dtype", "nonfinite", "budget"),
    [("PagedAdamW", "float32", "keep", 24 << 20), ("PagedAdamW8bit", "bfloat16", "skip", 6 << 20)],
    ids=["32 bits", "8 bits"],
)
def test_a_paged_step_takes_little_beyond_the_budget(kind, dtype, nonfinite, budget, tmp_path):
    """8 M parameters have 67 MB of moments, or 17; the peak of three steps, over what there was without any."""
    command = [sys.executable, "-c", PEAK, kind, dtype, nonfinite, str(budget), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)
    assert budget / 2 < peak < budget + MOST, f"{peak / 1e6:.1f} MB, of which {budget / 1e6:.1f} may be moments"


def larger_than(nbytes: int, share: float, bytes_each: int) -> nn.Parameter:
    """A parameter whose moments take that share of so many bytes; it takes none itself."""
    return nn.Parameter(torch.zeros(1).expand(int(nbytes * share / bytes_each)))


@pytest.mark.parametrize(("kind", "bytes_each"), [(PagedAdamW, 8), (PagedAdamW8bit, 2), (PagedAdEMAMix, 12), (PagedLion8bit, 1)])
def test_a_disk_without_room_for_all_moments(kind, bytes_each, tmp_path):
    """Each parameter's would fit; nothing has been written, and the parameters that did fit go on without the other."""
    facts = os.statvfs(tmp_path)
    free = facts.f_bavail * facts.f_frsize
    params = [larger_than(free, 0.6, bytes_each) for _ in range(2)]
    with pytest.raises(OSError, match=rf"no \d+ bytes for paging in folder {tmp_path} \(\d+ free\): No space left on device"):
        kind(params, folder=tmp_path)
    optimizer = kind([nn.Parameter(torch.ones(5000))], folder=tmp_path)
    with pytest.raises(OSError, match="No space left on device"):
        optimizer.add_param_group({"params": params})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["params"][0].grad = torch.ones(5000)
    optimizer.step()


def test_only_what_trains_counts(tmp_path):
    """Frozen parameters have no moments, nor do unpaged ones lie on the disk."""
    huge = larger_than(1 << 60, 1.0, 8)
    PagedAdamW([huge.requires_grad_(False), nn.Parameter(torch.ones(5000))], folder=tmp_path)
    AdamW([huge.requires_grad_(True)])


def test_a_disk_that_fills_up_later(tmp_path, monkeypatch):
    """Between the making and the first step: an error before anything is changed."""
    params = [nn.Parameter(torch.ones(5000)) for _ in range(2)]
    optimizer = PagedAdamW(params, folder=tmp_path)
    real = os.fstatvfs
    Facts = namedtuple("Facts", "f_bavail f_frsize")
    monkeypatch.setattr(os, "fstatvfs", lambda fd: Facts(1, real(fd).f_frsize))
    for p in params:
        p.grad = torch.ones(5000)
    with pytest.raises(OSError, match="No space left on device"):
        optimizer.step()
    assert all(torch.equal(p, torch.ones(5000)) for p in params)
    monkeypatch.undo()
    optimizer.step()
    assert all((p != 1).all() for p in params)
