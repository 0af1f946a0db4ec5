"""What one of 1, 2 and 4 processes holds, and what it sends in a training step, under DDP, fully_shard and tensor parallelism:
a small LLaMA in 4 bits with LoRA, beside HF peft on bitsandbytes under the same engine.

Processes of this machine over gloo (bench/distributed_step.py). Memory is what lies there between two steps, counted tensor by
tensor, and the peak of resident memory beyond that after import; of all processes the largest. Traffic is counted at the
collectives as they run (bench/collectives.py), and told as what ring algorithms put on the wire for them. Both are held against
the planner's figures, to the byte. No times: processes that share a processor have none that mean anything.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.distributed_step import ENGINES, LAYERS, ON_BITSANDBYTES, OURS, RANK, TIMEOUT, TOKENS, planned
from bench.goals import PartGoal, PlanGoal, Verdict
from bench.limits import Limits
from bench.measure import Row
from peftk.planner import Plan, traffic

TESTS = ("tests/distributed/test_processes.py", "tests/nn/test_sharded_state.py", "tests/planner/test_traffic.py")
HEADLINE = "memory a process, fully_shard, 4"
ROOT = Path(__file__).resolve().parents[2]
RANKS = (1, 2, 4)
PEERS = {OURS: (), ON_BITSANDBYTES: ("bitsandbytes", "peft")}


class Failed(Exception):
    """A process ended early; the message is the last line that it said."""


@dataclass(frozen=True)
class Counted:
    """Of the process with the most. ``why_not``: the candidate can't run so."""

    held: dict[str, int]  # by the planner's kinds
    peak: int = 0
    collectives: dict[str, int] | None = None
    ranks: int = 1
    why_not: str = ""

    @property
    def total(self) -> int:
        return sum(self.held.values())

    @property
    def sent(self) -> int:
        return sum(traffic.sent(self.collectives or {}, self.ranks).values())


def rows(size: int, repeat: int, limits: Limits, ranks: tuple[int, ...] = RANKS) -> Iterator[list[Row]]:
    """Two cases an engine and number of processes. A step is the same every time: nothing is repeated."""
    alone = {who: count(who, "ddp", 1, size) for who in PEERS}
    shape = f"LLaMA of {LAYERS} layers, {size // 4} wide, 1x{TOKENS} tokens, bf16, r={RANK}"
    yield [_memory(f"memory a process, 1, {shape}", who, found, (), alone[who]) for who, found in alone.items()]
    for engine, name in ENGINES.items():
        for n in ranks[1:]:
            found = {who: count(who, engine, n, size) for who in PEERS}
            plan = planned(engine, n, size)
            case = f"{name}, {n}, {shape}"
            yield [
                _memory(f"memory a process, {case}", w, f, verdicts(engine, f, alone[w], plan), alone[w])
                for w, f in found.items()
            ]
            yield [_traffic(f"traffic a step, {case}", who, f, plan) for who, f in found.items()]


def verdicts(engine: str, found: Counted, alone: Counted, plan: Plan) -> tuple[Verdict, ...]:
    """On our memory: as planned, and under fully_shard a part for each process."""
    expected = sum(plan.parts.get(kind, 0) for kind in found.held)
    part = (PartGoal(found.ranks).judge(found.total, alone.total),) if engine == "fsdp" else ()
    return (*part, PlanGoal(expected).judge(found.total))


def _memory(case: str, who: str, found: Counted, judged: tuple[Verdict, ...], alone: Counted) -> Row:
    if found.why_not:
        return Row(case, who, note=found.why_not)
    kinds = ", ".join(f"{kind} {n / 1e6:.2f}" for kind, n in found.held.items())
    note = f"{kinds}; peak {found.peak / 1e6:.1f}, of one process {alone.peak / 1e6:.1f} MB"
    return Row(case, who, rounds=1, verdicts=judged if who == OURS else (), extra=found.total, note=note)


def _traffic(case: str, who: str, found: Counted, plan: Plan) -> Row:
    if found.why_not:
        return Row(case, who, note=found.why_not)
    note = ", ".join(f"{kind} {n / 1e6:.3f} MB" for kind, n in (found.collectives or {}).items())
    judged = (PlanGoal(plan.sent).judge(found.sent),) if who == OURS else ()
    return Row(case, who, rounds=1, verdicts=judged, extra=found.sent, note=f"of the whole: {note}")


def count(who: str, engine: str, ranks: int, size: int) -> Counted:
    """RuntimeError where ours fails; a peer that can't run says why."""
    if missing := [package for package in PEERS[who] if importlib.util.find_spec(package) is None]:
        return Counted({}, ranks=ranks, why_not=f"{missing[0]} not installed")
    try:
        told = processes(who, engine, ranks, size)
    except Failed as failure:
        if who == OURS:
            raise RuntimeError(f"{ENGINES[engine]}, {ranks} processes: {failure}") from failure
        return Counted({}, ranks=ranks, why_not=f"can't run: {failure}")
    most = max(told, key=lambda one: sum(one["held"].values()))
    return Counted(most["held"], max(one["peak"] for one in told), most["collectives"], ranks)


def processes(who: str, engine: str, ranks: int, size: int) -> list[dict[str, Any]]:
    """What each of them told."""
    if not Path("/proc/self/clear_refs").exists():
        raise RuntimeError("the peak of memory is read from Linux's /proc/self, which isn't here")
    with tempfile.TemporaryDirectory() as folder:
        facts = {"who": who, "engine": engine, "ranks": ranks, "size": size, "store": f"{folder}/store"}
        commands = [[sys.executable, "-m", "bench.distributed_step", json.dumps(facts | {"rank": r})] for r in range(ranks)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for command in commands
        ]
        try:
            said = [process.communicate(timeout=TIMEOUT.total_seconds()) for process in started]
        finally:
            for process in started:
                process.kill()
    for process, (out, error) in zip(started, said, strict=True):
        if process.returncode or not out.strip():
            lines = [line for line in error.strip().splitlines() if "Error" in line] or error.strip().splitlines()
            raise Failed(lines[-1].partition("]: ")[2] or lines[-1] if lines else f"exit status {process.returncode}")
    return [json.loads(out.splitlines()[-1]) for out, _ in said]
