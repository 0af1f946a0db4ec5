"""Kernels in forked processes, in a data loader's workers, in many threads at once, and with a thread count that changes."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import peftk
from peftk.native import native

# m, n, k: work for several threads, and no tensor of 2^15 elements: torch starts its own threads for those, and hangs in a fork
SIZES = ((3, 96, 130), (65, 160, 192), (200, 130, 150), (1, 128, 250))
FORKING = """
import os, signal, sys
import torch
from torch.utils.data import DataLoader, Dataset
from reliability.test_forks_and_threads import all_ops

torch.set_num_threads(2)
expected = all_ops(0)  # the thread pool is at work before the fork


def same(seed):
    return all(map(torch.equal, all_ops(seed), expected))


child = os.fork()
if not child:
    signal.alarm(60)
    grandchild = os.fork()
    if not grandchild:
        os._exit(0 if same(0) else 3)
    _, status = os.waitpid(grandchild, 0)
    os._exit(0 if same(0) and status == 0 else 4)
_, status = os.waitpid(child, 0)
print("fork", status, same(0))


class Seeds(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return float(same(0))


print("loader", [batch.tolist() for batch in DataLoader(Seeds(), batch_size=3, num_workers=2, timeout=60)], same(0))
"""


def all_ops(seed: int, sizes: tuple[tuple[int, int, int], ...] = SIZES) -> list[torch.Tensor]:
    """Quantising, the product with LoRA forward and backward, dropout, and a step of 8-bit AdamW."""
    results = []
    for i, (m, n, k) in enumerate(sizes):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        rows = torch.exp(2 * torch.randn(n, 1, generator=generator))
        w4 = peftk.quantize_nf4(torch.randn(n, k, generator=generator) * rows)
        x = torch.randn(m, k, generator=generator).requires_grad_()
        a = torch.randn(8, k, generator=generator).requires_grad_()
        b = torch.randn(n, 8, generator=generator).requires_grad_()
        y = peftk.ops.nf4_lora_linear(x, w4, a, b, 0.5, dropout=0.1, seed=7)
        y.sum().backward()
        optimizer = peftk.optim.AdamW8bit([a, b], lr=1e-2)
        gradients = [t.grad.clone() for t in (x, a, b)]
        optimizer.step()
        results += [w4.packed, y.detach(), *gradients, a.detach(), b.detach(), w4.dequantize()]
    return results


@pytest.mark.skipif(native() is None, reason="no native build")
def test_a_fork_and_a_loaders_workers_compute_as_their_parent():
    """Where the thread runtime's other threads are gone: OpenMP's own would wait for them for ever."""
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=300, env=_environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["fork 0 True", "loader [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]] True"]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def test_threads_at_once_and_a_changing_thread_count():
    """Bit for bit what one thread computes, whoever else is at work."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = {seed: all_ops(seed) for seed in range(4)}
        torch.set_num_threads(2)
        with ThreadPoolExecutor(8) as pool:
            rounds = list(pool.map(lambda i: (i % 4, all_ops(i % 4)), range(16)))
        for threads in (3, 1, 4, 2):
            torch.set_num_threads(threads)
            rounds.append((0, all_ops(0)))
    finally:
        torch.set_num_threads(before)
    for seed, got in rounds:
        assert all(map(torch.equal, got, expected[seed])), seed
