"""Branches, barriers, the end; hints that change nothing here."""

from __future__ import annotations

import numpy as np

from ..decode import Barrier, Branch, Collective, Decoder, Exit, Step, constant, instruction
from ..faults import Trap
from ..memory import Lanes, lane_of
from ..state import State
from ..syntax import Symbol


@instruction("bra")
def branch(d: Decoder) -> Branch:
    d.take("uni")
    d.arity(1)
    return Branch((label(d, 0),))


@instruction("brx")
def branch_by_index(d: Decoder) -> Branch:
    d.need("idx")
    d.take("uni")
    d.arity(2)
    table = label(d, 1)
    if table not in d.program.entry.tables:
        raise d.unsupported("no such .branchtargets")
    return Branch(d.program.entry.tables[table], d.source(0, "u32"))


def label(d: Decoder, position: int) -> str:
    operand = d.operands[position]
    if not isinstance(operand, Symbol):
        raise d.unsupported("a label was expected")
    return operand.name


@instruction("ret", "exit")
def leave(d: Decoder) -> Exit:
    d.take("uni")
    d.arity(0)
    return Exit()


@instruction("trap", "brkpt")
def trap(d: Decoder) -> Step:
    d.arity(0)

    def step(s: State, lanes: Lanes) -> None:
        raise Trap("the kernel gave up", lane_of(lanes, 0))

    return step


@instruction("bar", "barrier")
def barrier(d: Decoder) -> Barrier | Collective:
    if d.take("warp"):
        d.need("sync")
        d.arity(1)
        return Collective(lambda s, lanes: None, d.source(0, "u32"))
    d.take("cta")
    aligned = bool(d.take("aligned")) or d.name == "bar"
    if d.take("red"):
        return barrier_with_vote(d, aligned)
    d.need("sync")
    d.arity(1, 2)
    return Barrier(d.source(0, "u32"), d.source(1, "s32") if len(d.operands) == 2 else None, aligned)


def barrier_with_vote(d: Decoder, aligned: bool) -> Barrier:
    """__syncthreads_count, _and, _or: over the threads that the barrier releases."""
    mode = d.need("popc", "and", "or")
    result = d.kind("u32", "pred")
    d.arity(3, 4)
    put = d.target(0, result)
    vote = d.source(len(d.operands) - 1, "pred")

    def step(s: State, lanes: Lanes) -> None:
        block = s.block if lanes is None else s.block[lanes]
        votes = np.bincount(block, np.broadcast_to(vote(s, lanes), block.shape), s.blocks)[block]
        voters = np.bincount(block, minlength=s.blocks)[block]
        put(s, lanes, votes.astype(np.uint32) if mode == "popc" else votes == voters if mode == "and" else votes > 0)

    return Barrier(d.source(1, "u32"), d.source(2, "s32") if len(d.operands) == 4 else None, aligned, step)


@instruction("membar", "fence", "nanosleep", "prefetch", "prefetchu", "discard", "applypriority")
def nothing(d: Decoder) -> Step:
    """Lanes run in one order, there is no cache."""
    d.modifiers.clear()
    return lambda s, lanes: None


@instruction("createpolicy")
def cache_policy(d: Decoder) -> Step:
    d.modifiers.clear()
    put, nought = d.target(0, "b64"), constant(np.uint64(0))
    return lambda s, lanes: put(s, lanes, nought(s, lanes))
