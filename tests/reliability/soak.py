"""Ten thousand training steps in one process: does memory grow?

    python -m tests.reliability.soak --steps 10000       the result becomes a row of long_runs.csv

A small QLoRA model with dropout and a paged 8-bit AdamW; every hundred steps the thread count changes, at every tenth of the run
its adapter is merged and unmerged, saved, taken off and loaded again. What counts is resident memory, after the first tenth.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import peftk
from tests.reliability.record import record

ALLOWED = 1 << 20  # bytes of growth; a leak of one small tensor a step is 10 times that in 10,000 steps


def resident_bytes() -> int:
    """Of this process, from the kernel."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Model(nn.Module):
    """Two quantised layers and a head."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.down(torch.relu(self.up(x))))


def soak(steps: int, show: bool = True) -> tuple[int, list[int]]:
    """(growth in bytes between the first tenth and the end, resident bytes at each tenth)."""
    from tqdm.auto import tqdm

    torch.manual_seed(0)
    model = Model()
    peftk.quantize_model(model, skip=("head",), progress=False)
    peftk.attach(model, peftk.LoraConfig(r=4, lora_dropout=0.1, target_modules=["up", "down"], modules_to_save=["head"]))
    optimizer = _optimizer(model)
    x, target = torch.randn(16, 64), torch.randint(0, 4, (16,))
    before, sizes, tenth = torch.get_num_threads(), [], max(steps // 10, 1)
    with tempfile.TemporaryDirectory() as folder:
        for step in tqdm(range(steps), unit="step", disable=not show, dynamic_ncols=True, mininterval=2):
            if step % 100 == 0:
                torch.set_num_threads(1 + step // 100 % 3)
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % tenth == tenth - 1:
                optimizer = _turned_over(model, optimizer, Path(folder) / "adapter")
                gc.collect()
                sizes.append(resident_bytes())
    torch.set_num_threads(before)
    return sizes[-1] - sizes[0], sizes


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return peftk.optim.PagedAdamW8bit(peftk.trainable_parameters(model), lr=1e-3)


def _turned_over(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> torch.optim.Optimizer:
    """Merged and unmerged, saved, taken off, loaded; an optimizer of the new parameters with the old one's state."""
    peftk.merge(model)
    peftk.unmerge(model)
    peftk.save_adapter(model, folder)
    peftk.detach(model)
    peftk.load_adapter(model, folder, is_trainable=True)
    fresh = _optimizer(model)
    fresh.load_state_dict(optimizer.state_dict())
    return fresh


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    steps = parser.parse_args().steps
    start = time.perf_counter()
    growth, sizes = soak(steps)
    print(f"resident MB at each tenth: {', '.join(f'{size / 1e6:.1f}' for size in sizes)}")
    told = f"{growth / 1e3:.0f} kB of growth after the first tenth, {ALLOWED / 1e3:.0f} allowed"
    record("soak", f"{steps} steps", told, growth <= ALLOWED, time.perf_counter() - start)
    return 0 if growth <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
