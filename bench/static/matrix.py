"""The matrix: every GPU kernel for every target, compiled, read back and judged; by two processes, kept under build/."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.static import gates, launches, nvcc, sass, tools, triton_aot
from bench.static.gates import Gate, Row

TRITON_STORE = nvcc.STORE / "triton"
PROCESSES = 2


@dataclass(frozen=True)
class Job:
    """One compilation: a .cu file with all its kernels, or one launch of a Triton kernel."""

    op: str
    backend: str
    target: str
    number: int = 0  # of launches.recorded(op, target), or of cuda_sources(op)

    def __str__(self) -> str:
        what = f"launch {self.number}" if self.backend == "triton" else cuda_sources(self.op)[self.number].name
        return f"{self.op} {self.backend} {self.target} {what}"


def triton_targets() -> list[str]:
    return [f"sm_{number}" for number in triton_aot.CUDA_TARGETS] + list(triton_aot.HIP_TARGETS)


def cuda_sources(op: str) -> list[Path]:
    return sorted((nvcc.ROOT / "csrc" / "ops" / op).glob("cuda*.cu"))


def ops(backend: str) -> list[str]:
    """Ops that have kernels of it."""
    if backend == "cuda":
        return sorted({path.parent.name for path in (nvcc.ROOT / "csrc" / "ops").glob("*/cuda*.cu")})
    return launches.ops_with_triton()


def why_not() -> str:
    """Why nothing can be compiled and read here; empty where it can."""
    return "; ".join(filter(None, (nvcc.why_not(), triton_aot.why_not(), tools.why_not())))


def jobs(chosen: Sequence[str] | None = None) -> list[Job]:
    """All of these ops (None: of every op)."""
    cuda = [
        Job(op, "cuda", target, source)
        for op in ops("cuda")
        if chosen is None or op in chosen
        for source in range(len(cuda_sources(op)))
        for target in nvcc.TARGETS
    ]
    triton = [
        Job(op, "triton", target, launch)
        for op in ops("triton")
        if chosen is None or op in chosen
        for target in triton_targets()
        for launch in range(len(launches.recorded(op, target)))
    ]
    return cuda + triton


def covering(every: Sequence[Job]) -> list[Job]:
    """A sample that holds every source and every launch for one target, the targets in turn."""
    by_source: dict[tuple[str, str, int], list[Job]] = {}
    for job in every:
        by_source.setdefault((job.backend, job.op, job.number), []).append(job)
    return [same[number % len(same)] for number, same in enumerate(by_source.values())]


def rows(work: Iterable[Job], table: Sequence[Gate], processes: int = PROCESSES) -> Iterator[list[Row]]:
    """Of each job its kernels, in the jobs' order."""
    work = list(work)
    if processes < 2 or len(work) < 2:
        for job in work:
            yield run(job, table)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(run, work, [table] * len(work))


def run(job: Job, table: Sequence[Gate]) -> list[Row]:
    """Compile and judge. RuntimeError with the compiler's words where it can't."""
    if job.backend == "cuda":
        return judged(nvcc.compiled(cuda_sources(job.op)[job.number], job.target), job.op, "cuda", job.target, table)
    os.environ.setdefault("TRITON_CACHE_DIR", str(TRITON_STORE))
    launch = launches.recorded(job.op, job.target)[job.number]
    target = int(job.target.removeprefix("sm_")) if job.target.startswith("sm_") else job.target
    compiled = launch.compiled(target)
    if isinstance(target, str):
        return [_judged_amd(compiled.asm["amdgcn"], launch.name, job, table)]
    TRITON_STORE.mkdir(parents=True, exist_ok=True)
    cubin = TRITON_STORE / f"{job.op}-{job.number}-{job.target}-{os.getpid()}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    try:
        return judged(cubin, job.op, "triton", job.target, table, launch.name, compiled.metadata.shared)
    finally:
        cubin.unlink()


def judged(
    cubin: Path, op: str, backend: str, target: str, table: Sequence[Gate], name: str | None = None, dynamic: int | None = None
) -> list[Row]:
    """Every kernel of a cubin beside its gate. ``name``: of its only one, where the cubin's own says too little."""
    found = []
    for kernel in sass.kernels(cubin):
        kernel.name = name or kernel.name
        gate = gates.find(table, op, backend, kernel.name, target)
        found.append(gates.judge(kernel, gate, op, backend, target, dynamic))
    if not found:
        raise RuntimeError(f"{cubin.name}: no kernel in it")
    return found


def _judged_amd(text: str, name: str, job: Job, table: Sequence[Gate]) -> Row:
    """From the metadata of AMD's assembly: registers, scratch memory and spills. Instructions aren't counted there."""

    def fact(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

    spills, stack = fact("vgpr_spill_count") + fact("sgpr_spill_count"), fact("private_segment_fixed_size")
    misses = [f"{spills} registers spilt, allowed: none"] if spills else []
    misses += [f"{stack} bytes of scratch memory a thread, allowed: none"] if stack else []
    gate = gates.find(table, job.op, "triton", name, job.target)
    if gate is None:
        misses.append("no row of gates.csv matches it")
    return Row(
        job.op,
        "triton",
        name,
        job.target,
        fact("vgpr_count"),
        fact("group_segment_fixed_size"),
        stack,
        spills,
        fact("max_flat_workgroup_size"),
        None,
        None,
        None,
        None,
        None,
        "",
        0,
        0,
        tuple(misses),
    )
