"""What a process or a card holds beside a step's tensors. Each figure with where it comes from."""

from __future__ import annotations

from peftk.planner.step import Step

PROCESS, RESERVED = "process", "driver and libraries"

# A CPU's process: what `python -m bench.memory_plan` measures beyond a step's tensors, SmolLM2 with QLoRA.
MODULE_BYTES = 12_000  # Python objects of a module, its parameters, tables and hooks: 14.9 MB for 1237 modules
PIECE_BYTES = 2_000  # a tensor's objects, its node in autograd's graph, the page that malloc rounds it up to; 1100 to 3000 seen
# Code that is read in at its first call, oneDNN's kernels, threads' working memory, holes between small blocks: 42 MB with 64
# tokens, 47 MB with 256. In a process that has run a step before, 18 MB.
FIRST_STEP_BYTES = 43_000_000

# A GPU's: CUDA's context with its kernels, and cuBLAS's workspace, 8.1 MiB a stream in torch, 32 MiB from sm_90 on. Not measured
# by us: no GPU was at hand. The allocator's rounding and gaps are not in it.
RESERVED_ON_GPU = 600_000_000


def of(step: Step, modules: int, pieces: int) -> dict[str, int]:
    """By name, for a model of so many modules, at a moment when memory lies in so many pieces."""
    if step.device_type == "cpu":
        return {PROCESS: FIRST_STEP_BYTES + MODULE_BYTES * modules + PIECE_BYTES * pieces}
    return {RESERVED: RESERVED_ON_GPU}
