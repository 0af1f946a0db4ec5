"""Gates: what is missed is told, in the table's own terms; and every compiled GPU kernel of peftk meets its gate."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from pathlib import Path

import pytest
from static_samples import SOURCE, needs_compilers, samples

from bench.static import gates, launches, matrix, nvcc, occupancy
from bench.static.gates import Gate, Row

PLAN = Gate(
    "copying", "cuda", "copy", "*", "path",
    elements=4, bytes=8, registers=16, shared=0, blocks=8, instructions=4, wide=1, needs="LDG.128 STG.128", forbids="ATOMG RED",
)  # fmt: skip


def misses(gate: Gate, name: str = "copy", target: str = "sm_80") -> tuple[str, ...]:
    return gates.judge(samples(target)[name], gate, gate.op, gate.backend, target).misses


@needs_compilers
def test_a_gate_that_is_met():
    row = gates.judge(samples("sm_80")["copy"], PLAN, "copying", "cuda", "sm_80")
    assert row.met == "met" and row.threads == 256 and row.blocks == 8 and row.occupancy == 1 and row.wide == 1
    assert row.per_element == row.instructions / 4 and row.bytes == 8 and row.spills == row.stack == row.shared == 0


@needs_compilers
@pytest.mark.parametrize(
    ("change", "kernel", "message"),
    [
        ({"registers": 8}, "copy", r"1\d registers, allowed: 8"),
        ({"shared": 512}, "sum", "1024 bytes of shared memory, allowed: 512"),
        ({"blocks": 9}, "copy", "8 blocks fit a multiprocessor, planned: 9"),
        ({"instructions": 2}, "copy", r"2\.75 instructions an element \(11 for 4\), allowed: 2"),
        ({"wide": 0.75}, "unpack", "50% of global bytes by 128-bit accesses, at least: 75%"),
        ({"needs": "HMMA|HGMMA"}, "copy", r"no HMMA\|HGMMA in the counted region"),
        ({"forbids": "STG.128"}, "copy", "1 STG.128, allowed: none"),
        ({"elements": 5}, "copy", "32 bytes move in the counted region and 5 elements take 40: elements is too large"),
        ({"region": "loop"}, "copy", "copy: the table counts a loop, and there is none"),
        ({"region": "path"}, "sum", "1 loops inside the counted path: count one of them"),
        ({"elements": None}, "copy", "the gate limits instructions and tells no elements"),
        ({}, "unbounded", "no __launch_bounds__"),
    ],
)
def test_what_is_missed_is_told(change: dict, kernel: str, message: str):
    found = misses(dataclasses.replace(PLAN, **change), kernel)
    assert any(re.search(message, miss) for miss in found), found


@needs_compilers
@pytest.mark.parametrize("kernel", ["spilling", "local_array"])
@pytest.mark.parametrize("target", nvcc.TARGETS)
def test_local_memory_is_never_allowed(kernel: str, target: str):
    """Even by a row without limits."""
    found = misses(Gate("copying", "cuda", "*", "*", "once"), kernel, target)
    assert len(found) == 2 and "STL (spills or local arrays), allowed: none" in found[0] and "bytes of stack" in found[1]


@needs_compilers
def test_a_kernel_without_a_gate_and_a_gate_without_a_kernel():
    cubin = nvcc.compiled(SOURCE, "sm_80")
    stray = dataclasses.replace(PLAN, kernel="copied*")
    rows = matrix.judged(cubin, "copying", "cuda", "sm_80", [PLAN, stray])
    assert [row.kernel for row in rows if "no row of gates.csv matches it" not in row.misses] == ["copy"]
    assert gates.unused([PLAN, stray], [("copying", "cuda", row.kernel, "sm_80") for row in rows]) == [stray]


def test_the_first_row_that_matches():
    general, special = dataclasses.replace(PLAN, kernel="*"), dataclasses.replace(PLAN, target="sm_90a")
    assert gates.find([special, general], "copying", "cuda", "copy", "sm_90a") is special
    assert gates.find([special, general], "copying", "cuda", "copy", "sm_80") is general
    assert gates.find([special], "copying", "triton", "copy", "sm_90a") is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,cuda,k,*,loop,many", "gates.csv, row 2, elements: expected a number, got 'many'"),
        ("a,cuda,k,*,round,4", "gates.csv, row 2, region: expected one of path, once, loop, got 'round'"),
    ],
)
def test_a_bad_cell(row: str, message: str, tmp_path: Path):
    path = tmp_path / "gates.csv"
    path.write_text(f"op,backend,kernel,target,region,elements\n{row}\n")
    with pytest.raises(ValueError, match=message):
        gates.read(path)
    path.write_text("op,backend,kernel,target,region,registres\na,cuda,k,*,loop,4\n")
    with pytest.raises(ValueError, match="unknown columns \\['registres'\\]"):
        gates.read(path)


# ---- occupancy ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "threads", "blocks"),
    [
        (80, 32, 0, 256, 8),  # all 2048 threads
        (80, 33, 0, 256, 6),  # 40 a thread are handed out, in whole warps on four schedulers
        (80, 168, 0, 384, 1),
        (80, 255, 0, 512, 0),  # more registers than a block may have
        (80, 40, 0, 96, 16),  # 12 warps a scheduler, where 51 would fit all four
        (80, 32, 41 * 1024, 128, 3),  # 164 KiB, and 1 of each block is the system's
        (80, 32, 164 * 1024, 128, 0),
        (80, 16, 0, 32, 32),  # blocks
        (75, 64, 0, 256, 4),
        (75, 32, 32 * 1024, 64, 2),  # nothing reserved on Turing
        (86, 40, 0, 256, 6),  # 1536 threads
        (89, 16, 0, 32, 24),
        (90, 64, 113 * 1024, 256, 2),
        (100, 128, 75 * 1024, 256, 2),
        (120, 32, 49 * 1024, 128, 2),
    ],
)
def test_blocks_that_fit(capability: int, registers: int, shared: int, threads: int, blocks: int):
    """By hand from the programming guide's table."""
    assert occupancy.blocks_per_sm(registers, shared, threads, capability) == blocks


def test_occupancy():
    assert occupancy.occupancy(6, 256, 86) == 1 and occupancy.occupancy(4, 100, 80) == 0.25
    assert [occupancy.capability(target) for target in ("sm_75", "sm_90a", "sm_120a")] == [75, 90, 120]


# ---- peftk's kernels ---------------------------------------------------------------------------------------------------------


@cache
def compiled(whole: bool) -> tuple[Row, ...]:
    """All jobs, or the sample that CI takes."""
    every = matrix.jobs()
    return tuple(row for rows in matrix.rows(every if whole else matrix.covering(every), gates.read()) for row in rows)


def all_met(rows: tuple[Row, ...]) -> None:
    assert not [f"{row.kernel} for {row.target}: {row.met}" for row in rows if row.misses]


@needs_compilers
def test_gates_are_met():
    """A sample: every source and launch for one target, the targets in turn."""
    rows = compiled(whole=False)
    assert {row.target for row in rows if row.backend == "cuda"} == set(nvcc.TARGETS)
    assert {row.target for row in rows if row.backend == "triton"} == set(matrix.triton_targets())
    all_met(rows)


@needs_compilers
def test_every_kernel_has_a_gate_and_every_gate_a_kernel():
    """For every target: which CUDA kernels there are doesn't depend on it; which of Triton's are launched, and as what, does."""
    names = {(row.op, row.backend, row.kernel) for row in compiled(whole=False) if row.backend == "cuda"}
    kernels = [(*name, target) for name in sorted(names) for target in nvcc.TARGETS]
    for target in matrix.triton_targets():
        for op in launches.ops_with_triton():
            kernels += [(op, "triton", launch.name, target) for launch in launches.recorded(op, target)]
    assert [kernel for kernel in kernels if gates.find(gates.read(), *kernel) is None] == []
    assert gates.unused(gates.read(), kernels) == []


@needs_compilers
@pytest.mark.full
def test_all_gates_are_met():
    all_met(compiled(whole=True))


@needs_compilers
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_limit_that_is_too_small_is_told(backend: str):
    """Each of our own kernels, its registers held to one fewer than it has."""
    sample = matrix.covering(matrix.jobs())
    for row in [row for row in compiled(whole=False) if row.backend == backend][:2]:
        jobs = [job for job in sample if (job.op, job.backend, job.target) == (row.op, backend, row.target)]
        held = [dataclasses.replace(gate, registers=row.registers - 1) for gate in gates.read()]
        again = [r for job in jobs for r in matrix.run(job, held) if r.kernel == row.kernel]
        assert again and all(f"{row.registers} registers, allowed: {row.registers - 1}" in r.misses for r in again)
