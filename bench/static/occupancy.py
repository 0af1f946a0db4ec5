"""Blocks of a kernel that fit one multiprocessor, from its registers, shared memory and threads (CUDA C++ Programming Guide,
technical specifications by compute capability; CUDA occupancy calculator for the granularities)."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS = 65536  # 32-bit ones of a multiprocessor, and the most of a block
REGISTERS_STEP = 256  # a warp's registers are handed out in this unit
KIB = 1024


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor."""

    threads: int
    blocks: int
    shared: int  # bytes
    shared_of_block: int  # bytes, after the kernel has asked for more than 48 KiB
    shared_reserved: int  # bytes that the system takes of each block
    shared_step: int  # bytes


def _limits(threads: int, blocks: int, shared: int, shared_of_block: int, reserved: int = KIB, step: int = 128) -> Limits:
    return Limits(threads, blocks, shared * KIB, shared_of_block * KIB, reserved, step)


LIMITS = {
    75: _limits(1024, 16, 64, 64, reserved=0, step=256),
    80: _limits(2048, 32, 164, 163),
    86: _limits(1536, 16, 100, 99),
    89: _limits(1536, 24, 100, 99),
    90: _limits(2048, 32, 228, 227),
    100: _limits(2048, 32, 228, 227),
    120: _limits(1536, 24, 100, 99),
}


def capability(target: str) -> int:
    """75 of "sm_75", 90 of "sm_90a"."""
    return int(target.removeprefix("sm_").rstrip("af"))


def blocks_per_sm(registers: int, shared: int, threads: int, capability: int) -> int:
    """registers: a thread's; shared: bytes of a block, static and dynamic. 0 where not even one block fits. KeyError for a
    capability that isn't in LIMITS."""
    limits = LIMITS[capability]
    warps = -(-threads // WARP)
    of_warp = _up(registers * WARP, REGISTERS_STEP)
    of_block = _up(shared + limits.shared_reserved, limits.shared_step)
    if shared > limits.shared_of_block or of_warp * warps > REGISTERS or threads > 1024:
        return 0
    by_shared = limits.shared // of_block if of_block else limits.blocks
    by_registers = REGISTERS // 4 // of_warp * 4 // warps if of_warp else limits.blocks  # warps live on four schedulers
    return min(limits.blocks, limits.threads // (warps * WARP), by_shared, by_registers)


def occupancy(blocks: int, threads: int, capability: int) -> float:
    """Share of the threads that a multiprocessor can hold."""
    return blocks * _up(threads, WARP) / LIMITS[capability].threads


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
