"""Control flow of a kernel's SASS, and the part of it that is counted: its main path, or the body of its hot loop.

The main path is the one that a thread takes through a full tile: among all ways from the entry to an EXIT (of a loop: from its
head back to it) the one with the most MMAs, then the most bytes by 128-bit accesses (by any, where there are none), by others
outside of loops, then the fewest instructions. Ragged edges, which take other ways, are not counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bench.static.sass import Instruction, Kernel

WIDE = 16  # bytes of a 128-bit access
CALL = 1000  # instructions: what a function is taken for, so that rare cases (a reciprocal's subnormals) aren't the main path
REGIONS = ("path", "once", "loop")
_LABEL = re.compile(r"\(([^()\s]+)\)|(\.L_x_\d+)")  # `(.L_x_3), and BRX's list of targets


class Weight(NamedTuple):
    """By what a way is chosen; adds up along it."""

    mma: int
    wide: int  # bytes by 128-bit accesses; by any, in a kernel that has none
    other: int  # bytes by narrower ones outside inner loops, where ragged edges are done
    saved: int  # instructions, negative


@dataclass(frozen=True)
class Block:
    start: int
    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]  # starts of blocks


@dataclass(frozen=True)
class Counted:
    """What a thread issues in the counted region, once."""

    instructions: int
    opcodes: Counter[str]  # by base: HMMA, LDG
    every: tuple[Instruction, ...]
    loops: int  # loops that the path enters, each counted once

    @property
    def global_bytes(self) -> int:
        """To and from global memory."""
        return sum(i.global_bytes for i in self.every)

    @property
    def wide_share(self) -> float | None:
        """Of the bytes to and from global memory, those by accesses of 128 bits or more; None without any access."""
        wide = sum(i.global_bytes for i in self.every if i.global_bytes >= WIDE)
        return wide / self.global_bytes if self.global_bytes else None

    @property
    def calls(self) -> int:
        """To functions, whose instructions aren't counted."""
        return sum(map(_calls, self.every))

    @property
    def mma(self) -> str:
        """``64 HMMA``; empty where there is none."""
        return ", ".join(f"{n} {base}" for base, n in Counter(i.base for i in self.every if i.is_mma).most_common())


def counted(kernel: Kernel, region: str) -> Counted:
    """The region of a kernel: "path" and "once" are its main path, "loop" is the body of its hot loop. ValueError without one."""
    blocks = basic_blocks(kernel)
    dominators = _dominators(blocks)
    loops = natural_loops(blocks, dominators)
    working = {head for head, body in loops.items() if _works(blocks, body)}
    ways = {head: _best_way(blocks, loops[head], head, dominators, loops, back_to=head) for head in working}
    if region == "loop":
        if not ways:
            raise ValueError(f"{kernel.name}: the table counts a loop, and there is none")
        way = ways[max(ways, key=lambda head: _heat(blocks, ways[head]))]
        entered = sum(start in working for start in way[1:])
    else:
        way = _best_way(blocks, set(blocks), 0, dominators, loops, back_to=None)
        entered = sum(start in working for start in way)
    every = tuple(i for start in way for i in blocks[start].instructions if i.base != "NOP")
    return Counted(len(every), Counter(i.base for i in every), every, entered)


# ---- blocks -----------------------------------------------------------------------------------------------------------------


def basic_blocks(kernel: Kernel) -> dict[int, Block]:
    """Start -> block, of what the entry reaches; a call is an instruction like any other."""
    code = kernel.instructions
    at = {instruction.address: position for position, instruction in enumerate(code)}
    rejoin = _rejoin_points(kernel)
    follow = {i.address: _successors(i, kernel.labels, rejoin) for i in code}
    leaders = {0}
    for instruction in code:
        if follow[instruction.address] != (instruction.address + 16,) or instruction.base == "EXIT":
            leaders |= {instruction.address + 16, *follow[instruction.address]}
    blocks: dict[int, Block] = {}
    todo = [0]
    while todo:
        start = todo.pop()
        if start in blocks or start not in at:
            continue
        end = at[start]
        while follow[code[end].address] == (code[end].address + 16,) and code[end].address + 16 not in leaders:
            end += 1
        inside = tuple(code[at[start] : end + 1])
        blocks[start] = Block(start, inside, tuple(s for s in follow[inside[-1].address] if s in at))
        todo += blocks[start].successors
    return blocks


def _rejoin_points(kernel: Kernel) -> dict[str, set[int]]:
    """Barrier register -> where threads go on after a BSYNC on it, as the BSSYs say."""
    points: dict[str, set[int]] = {}
    for instruction in kernel.instructions:
        if instruction.base == "BSSY":
            points.setdefault(instruction.operands.partition(",")[0].strip(), set()).update(_targets(instruction, kernel.labels))
    return points


def _targets(instruction: Instruction, labels: dict[str, int]) -> list[int]:
    names = [a or b for a, b in _LABEL.findall(instruction.operands)]
    return [labels[name] for name in names if name in labels]


def _leaves(instruction: Instruction) -> bool:
    """Whether it is a CALL to a label, ptxas' way out of some loops. Calls proper have names."""
    return instruction.base == "CALL" and ".L_x_" in instruction.operands


def _successors(instruction: Instruction, labels: dict[str, int], rejoin: dict[str, set[int]]) -> tuple[int, ...]:
    following = instruction.address + 16
    always = instruction.guard in ("", "PT", "UPT")
    if instruction.base in ("EXIT", "RET", "KILL"):
        return () if always else (following,)
    if _leaves(instruction) or instruction.base in ("BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU"):
        targets = _targets(instruction, labels)
        if not targets:
            raise ValueError(f"{instruction.opcode} at {instruction.address:#x}: no target that is known")
        if "DIV" in instruction.parts:  # a warp that isn't whole, before a shuffle: no thread of a full tile
            return (following,)
        # `BRA P1, (…)` goes on with the next one as well.
        plain = instruction.base != "BRA" or instruction.operands.startswith(("`", "("))
        return tuple(dict.fromkeys(targets if always and plain else [*targets, following]))
    if instruction.base == "BSYNC":
        points = rejoin.get(instruction.operands.strip(), set())
        return (following,) if following in points or not points else tuple(sorted(points))
    return (following,)


def _calls(instruction: Instruction) -> bool:
    return instruction.base == "CALL" and not _leaves(instruction)


# ---- loops ------------------------------------------------------------------------------------------------------------------


def _dominators(blocks: dict[int, Block]) -> dict[int, set[int]]:
    """Block -> blocks that every way from the entry to it goes through, itself included."""
    before: dict[int, set[int]] = {start: set() for start in blocks}
    for start, block in blocks.items():
        for successor in block.successors:
            before[successor].add(start)
    every = set(blocks)
    found = {start: {0} if start == 0 else every for start in blocks}
    changed = True
    while changed:
        changed = False
        for start in sorted(blocks):
            if start == 0:
                continue
            new = {start} | set.intersection(*(found[b] for b in before[start]))
            changed |= new != found[start]
            found[start] = new
    return found


def natural_loops(blocks: dict[int, Block], dominators: dict[int, set[int]]) -> dict[int, set[int]]:
    """Head -> the loop's blocks."""
    loops: dict[int, set[int]] = {}
    before: dict[int, list[int]] = {}
    for start, block in blocks.items():
        for successor in block.successors:
            before.setdefault(successor, []).append(start)
    for start, block in blocks.items():
        for head in block.successors:
            if head not in dominators[start]:
                continue
            body, todo = loops.setdefault(head, {head}), [start]
            while todo:
                if (one := todo.pop()) not in body:
                    body.add(one)
                    todo += before.get(one, [])
    return loops


def _works(blocks: dict[int, Block], body: Iterable[int]) -> bool:
    """Whether a loop multiplies, or reads global or shared memory. One that waits for a barrier doesn't."""
    return any(i.global_bytes or i.is_mma or i.base == "LDS" for start in body for i in blocks[start].instructions)


def _heat(blocks: dict[int, Block], way: list[int]) -> Weight:
    """By what the hot loop is chosen: MMAs, else bytes, as on the main path; of a nest that share them, the innermost."""
    weights = [_weight(blocks[start].instructions, _least_bytes(blocks), in_loop=True) for start in way]
    total = Weight(*map(sum, zip(*weights, strict=True)))
    return total._replace(wide=0) if total.mma else total


# ---- the main path ----------------------------------------------------------------------------------------------------------


def _weight(instructions: Sequence[Instruction], least: int, in_loop: bool) -> Weight:
    total = sum(i.global_bytes for i in instructions)
    wide = sum(i.global_bytes for i in instructions if i.global_bytes >= least)
    mma = sum(i.is_mma for i in instructions)
    issued = sum(CALL if _calls(i) else i.base != "NOP" for i in instructions)
    return Weight(mma, wide, 0 if in_loop else total - wide, -issued)


def _least_bytes(blocks: dict[int, Block]) -> int:
    """Of an access that decides: 128 bits, where the kernel has any of those."""
    return WIDE if any(i.global_bytes >= WIDE for block in blocks.values() for i in block.instructions) else 1


def _best_way(
    blocks: dict[int, Block],
    inside: set[int],
    entry: int,
    dominators: dict[int, set[int]],
    loops: dict[int, set[int]],
    back_to: int | None,
) -> list[int]:
    """Starts of the blocks of the best way inside these, from the entry to an end: an EXIT, or an edge back to ``back_to``."""
    least = _least_bytes(blocks)
    nested = set().union(*(body for head, body in loops.items() if body < inside and head != back_to and _works(blocks, body)))

    def onward(start: int) -> set[int]:
        """Where a block leads to; from the end of a loop's body, to where the loop's head leaves it."""
        found: set[int] = set()
        for successor in blocks[start].successors:
            if successor in dominators[start] and successor != back_to:
                found |= {s for s in onward(successor) if s not in loops[successor]} if successor != start else set()
            else:
                found.add(successor)
        return found

    following = {start: onward(start) for start in inside}
    best: dict[int, tuple[Weight, list[int]]] = {}
    for start in _postorder(following, entry, back_to):
        own = _weight(blocks[start].instructions, least, start in nested)
        ways = [best[s] for s in following[start] if s in best and s != back_to]
        if back_to in following[start] if back_to is not None else blocks[start].instructions[-1].base in ("EXIT", "RET"):
            ways.append((Weight(0, 0, 0, 0), []))
        if ways:
            weight, way = max(ways, key=lambda one: one[0])
            best[start] = Weight(*map(sum, zip(own, weight, strict=True))), [start, *way]
    if entry not in best:
        raise ValueError(f"control flow from {entry:#x}: no way to an end")
    return best[entry][1]


def _postorder(following: dict[int, set[int]], entry: int, back_to: int | None) -> list[int]:
    """Every block after those that follow it. ValueError where they go round in a cycle."""
    order: list[int] = []
    state: dict[int, str] = {}
    stack = [(entry, False)]
    while stack:
        start, done = stack.pop()
        if done:
            state[start] = "done"
            order.append(start)
        elif start not in state:
            state[start] = "open"
            stack.append((start, True))
            for successor in following[start]:
                if successor not in following or successor == back_to:
                    continue
                if state.get(successor) == "open":
                    raise ValueError(f"control flow at {start:#x}: a loop with two entries")
                stack.append((successor, False))
    return order
