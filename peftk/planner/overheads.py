"""What a process or a card holds beside a step's tensors. Each figure with where it comes from."""

from __future__ import annotations

from peftk.planner.ledger import Moment
from peftk.planner.step import ACTIVATIONS, INPUT_GRADIENTS, LOGITS, Step

PROCESS, RESERVED, HOLES = "process", "driver and libraries", "holes in the heap"

# A CPU's process: what `python -m bench.memory_plan` measures beyond a step's tensors, SmolLM2 with QLoRA.
MODULE_BYTES = 12_000  # Python objects of a module, its parameters, tables and hooks: 14.9 MB for 1237 modules
PIECE_BYTES = 2_000  # a tensor's objects, its node in autograd's graph, the page that malloc rounds it up to; 1100 to 3000 seen
# Code that is read in at its first call, oneDNN's kernels, threads' working memory, holes between small blocks: 42 MB with 64
# tokens, 47 MB with 256. In a process that has run a step before, 18 MB.
FIRST_STEP_BYTES = 43_000_000

# Where malloc keeps what is freed (`peftk finetune` has it so: a step then has no page faults), small objects settle in freed
# tensors' places, and the next step's tensors don't fit into what is left. In shares of what a step makes and frees: fitted to
# SmolLM2 with LoRA on both bases, 1 x 256 and 4 x 256 tokens, with and without checkpointing; other methods and the 1.1B LLaMA
# are what it was checked on (bench/results/memory-plan.csv, bench/LOG.md).
HOLES_IN_ACTIVATIONS, HOLES_IN_LOGITS = 0.6, 1.0

# A GPU's: CUDA's context with its kernels, and cuBLAS's workspace, 8.1 MiB a stream in torch, 32 MiB from sm_90 on. Not measured
# by us: no GPU was at hand. The allocator's rounding and gaps are not in it.
RESERVED_ON_GPU = 600_000_000


def of(step: Step, modules: int, moment: Moment, keeps_freed: bool = False) -> dict[str, int]:
    """By name, for a model of so many modules, at a moment. ``keeps_freed``: whether malloc keeps what is freed."""
    if step.device_type != "cpu":
        return {RESERVED: RESERVED_ON_GPU}
    found = {PROCESS: FIRST_STEP_BYTES + MODULE_BYTES * modules + PIECE_BYTES * moment.pieces}
    if keeps_freed:
        made = moment.parts.get(ACTIVATIONS, 0) + moment.parts.get(INPUT_GRADIENTS, 0)
        found[HOLES] = int(HOLES_IN_ACTIVATIONS * made + HOLES_IN_LOGITS * moment.parts.get(LOGITS, 0))
    return found
