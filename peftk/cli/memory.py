"""How much memory this process and its device have taken."""

from __future__ import annotations

import sys

import torch


def peak_bytes(device: torch.device) -> int | None:
    """Peak so far: of the device's allocator on CUDA, of the whole process on the CPU; None where the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def readable(size: int | None) -> str:
    """Bytes for people: '86.4 MB', powers of 1000; '?' for None."""
    if size is None:
        return "?"
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
