"""Which lanes run next. Lanes at one statement run together; the group that is furthest behind goes first, so that groups which
meet become one again. Threads that need others wait: at barriers for their block, at ``.sync`` instructions for their mask."""

from __future__ import annotations

import numpy as np

from .decode import Action, Barrier, Branch, Collective, Exit, Program
from .faults import Deadlock, Fault
from .memory import Lanes
from .state import State, warp_bits

END = 1 << 60  # behind every statement
PATIENCE = 20_000  # loops that the hindmost group may make while others could run


class Scheduler:
    """Runs one batch to its end. ``executed`` counts lanes by statement."""

    def __init__(self, program: Program, s: State, executed: list[int]):
        self.program, self.s, self.executed = program, s, executed
        self.steps = [*program.steps, Exit()]
        self.actions = [*program.actions, self.steps[-1]]
        self.guards = [*program.guards, None]
        self.runnable: dict[int, Lanes] = {}
        self.parked: dict[int, np.ndarray] = {}  # at a collective whose mask isn't complete
        self.barrier = np.zeros(s.lanes, np.int32)  # 1 + the number of the barrier that a lane waits at
        self.waits_at = np.zeros(s.lanes, np.int64)  # the statement
        self.wanted = np.zeros(s.lanes, np.int64)  # threads that the barrier waits for
        self.waiting = 0
        self.loops = 0
        self.pc = 0

    def run(self) -> None:
        """Every lane up to its exit. A fault knows its place."""
        s = self.s
        self.add(0, None if s.live.all() else np.flatnonzero(s.live))
        try:
            while self.runnable or self.wake():
                spins = self.loops > PATIENCE  # the hindmost may wait in a loop for one that is ahead of it
                self.loops = 0
                pc = max(self.runnable) if spins else min(self.runnable)
                lanes = self.runnable.pop(pc)
                self.advance(pc, lanes, END if spins else min(self.runnable, default=END))
        except Fault as fault:
            raise self.located(fault) from None

    def located(self, fault: Fault) -> Fault:
        statements = self.program.entry.statements
        statement = statements[min(self.pc, len(statements) - 1)]
        block, thread = self.s.place(fault.lane) if fault.lane is not None else (None, None)
        return fault.locate(self.program.entry.name, statement.text, statement.line, block, thread)

    def add(self, pc: int, lanes: Lanes) -> None:
        """Lanes that go on at a statement, together with those already there."""
        there = self.runnable.get(pc, np.empty(0, np.int64))
        if lanes is not None and there is not None and len(there):
            lanes = np.sort(np.concatenate([there, lanes]))
        if lanes is not None and len(lanes) == self.s.lanes:
            lanes = None
        if lanes is None or len(lanes):
            self.runnable[pc] = lanes

    def advance(self, pc: int, lanes: Lanes, limit: int) -> None:
        """One group until it meets the next one, splits, waits or ends."""
        s, steps, actions, guards, executed = self.s, self.steps, self.actions, self.guards, self.executed
        count = s.count(lanes)
        while pc < limit:
            step, action, guard = steps[pc], actions[pc], guards[pc]
            self.pc = pc
            active = lanes
            if guard is not None:
                active = self.guarded(guard, lanes)
            if action is not None:
                if self.act(pc, action, lanes, active):
                    pc = self.pc
                    continue
                return
            if guard is None:
                executed[pc] += count
                step(s, lanes)
            elif active is None or len(active):
                executed[pc] += s.count(active)
                step(s, active)
            pc += 1
        self.add(pc, lanes)

    def guarded(self, guard: tuple[int, bool], lanes: Lanes) -> Lanes:
        """The lanes whose predicate holds."""
        slot, negated = guard
        holds = self.s.slots[slot]
        if lanes is not None:
            holds = holds[lanes]
        true = np.count_nonzero(holds)
        if true == (0 if negated else len(holds)):
            return lanes
        if true == (len(holds) if negated else 0):
            return np.empty(0, np.int64)
        chosen = np.flatnonzero(~holds if negated else holds)
        return chosen if lanes is None else lanes[chosen]

    def act(self, pc: int, action: Action, lanes: Lanes, active: Lanes) -> bool:
        """Moves the lanes; true where the whole group goes on together, at self.pc."""
        if active is not lanes:
            if not len(active):
                self.pc = pc + 1
                return True
            rest = without(self.s.numbers(lanes), active)
            self.add(pc + 1, rest)
        self.executed[pc] += self.s.count(active)
        together = active is lanes
        if isinstance(action, Branch):
            return self.branch(action, active, together)
        if isinstance(action, Collective):
            return self.collective(pc, action, active, together)
        if isinstance(action, Barrier):
            return self.arrive(pc, action, active, together)
        self.exit(active)
        return False

    def branch(self, branch: Branch, lanes: Lanes, together: bool) -> bool:
        if branch.index is None:
            target = branch.targets[0]
            self.loops += target <= self.pc
            if together and not (self.loops > PATIENCE and self.runnable):
                self.pc = target
                return True
            self.add(target, lanes)
            return False
        index = np.broadcast_to(branch.index(self.s, lanes), self.s.count(lanes))
        numbers = self.s.numbers(lanes)
        if int(index.max()) >= len(branch.targets):
            raise Fault(f"index {int(index.max())} of {len(branch.targets)} branch targets", int(numbers[index.argmax()]))
        for number in np.unique(index):
            self.add(branch.targets[int(number)], numbers[index == number])
        return False

    def exit(self, lanes: Lanes) -> None:
        self.s.live[... if lanes is None else lanes] = False
        if self.waiting:
            self.release()

    # ---- .sync instructions ---------------------------------------------------------------------------------------------------

    def collective(self, pc: int, action: Collective, lanes: Lanes, together: bool) -> bool:
        """Runs for the lanes whose members have come, parks the others."""
        s = self.s
        if lanes is None:
            s.now += 1
            action.step(s, None)
            s.last_sync.fill(s.now)
            self.pc = pc + 1
            return True
        if pc in self.parked:
            self.executed[pc] -= len(self.parked[pc])
            lanes = np.sort(np.concatenate([self.parked.pop(pc), lanes]))
            together = False
        mask = np.uint32(0xFFFFFFFF) if action.mask is None else action.mask(s, lanes)
        missing = mask & warp_bits(s, np.flatnonzero(s.live), lanes) & ~warp_bits(s, lanes, lanes)
        ready = lanes[missing == 0]
        if len(ready) < len(lanes):
            self.parked[pc] = lanes[missing != 0]
        if not len(ready):
            return False
        s.now += 1
        action.step(s, ready)
        s.last_sync[ready] = s.now
        if together and len(ready) == len(lanes):
            self.pc = pc + 1
            return True
        self.add(pc + 1, ready)
        return False

    def wake(self) -> bool:
        """Nobody can run: parked lanes whose missing members have exited can; else the rest is stuck."""
        if not self.parked and not self.waiting:
            return False
        for pc in list(self.parked):
            lanes = self.parked.pop(pc)
            self.executed[pc] -= len(lanes)
            self.pc = pc
            if self.act(pc, self.steps[pc], lanes, lanes):
                self.add(self.pc, lanes)
        if not self.runnable:
            self.stuck()
        return True

    def stuck(self) -> None:
        """The fault of those that wait for ever."""
        for pc, lanes in self.parked.items():
            self.pc = pc
            raise Deadlock(f"{len(lanes)} threads wait for members of their mask that never come", int(lanes[0]))
        lanes = np.flatnonzero(self.barrier)
        self.pc = int(self.waits_at[lanes[0]])
        block = self.s.block[lanes[0]]
        here = int(np.count_nonzero(self.s.block[lanes] == block))
        live = int(np.count_nonzero(self.s.live[self.s.block == block]))
        raise Deadlock(f"{here} of the block's {live} live threads wait at barriers for others that never come", int(lanes[0]))

    # ---- barriers -------------------------------------------------------------------------------------------------------------

    def arrive(self, pc: int, barrier: Barrier, lanes: Lanes, together: bool) -> bool:
        s = self.s
        if lanes is None and not self.waiting and barrier.threads is None:  # every thread of every block at one statement
            s.now += 1
            s.last_barrier.fill(s.now)
            s.last_sync.fill(s.now)
            if barrier.step:
                barrier.step(s, None)
            self.pc = pc + 1
            return True
        numbers = s.numbers(lanes)
        self.barrier[numbers] = barrier.number(s, lanes).astype(np.int32) + 1
        self.waits_at[numbers] = pc
        self.wanted[numbers] = 0 if barrier.threads is None else barrier.threads(s, lanes)
        self.waiting += len(numbers)
        self.release()
        return False

    def release(self) -> None:
        """Lets go the blocks whose barrier is complete: the wanted number of threads, or all that live."""
        s = self.s
        lanes = np.flatnonzero(self.barrier)
        key = s.block[lanes] * 64 + self.barrier[lanes]
        arrived = np.bincount(key, minlength=s.blocks * 64 + 64)[key]
        live = np.bincount(s.block[s.live], minlength=s.blocks)[s.block[lanes]]
        complete = arrived >= np.where(self.wanted[lanes] > 0, self.wanted[lanes], live)
        free = lanes[complete]
        if not len(free):
            return
        self.check_convergence(free)
        self.barrier[free] = 0
        self.waiting -= len(free)
        s.now += 1
        s.last_barrier[free] = s.now
        s.last_sync[free] = s.now
        at = self.waits_at[free]
        for pc in np.unique(at):
            together = free[at == pc]
            if step := self.steps[pc].step:
                step(s, together)
            self.add(int(pc) + 1, together)

    def check_convergence(self, lanes: np.ndarray) -> None:
        """A bar.sync is for whole warps: their threads come together, to one statement."""
        s = self.s
        warp = lanes >> 5
        start = np.searchsorted(warp, warp)
        apart = self.waits_at[lanes] != self.waits_at[lanes[start]]
        arrived = np.bincount(warp, minlength=s.lanes >> 5)
        missing = arrived[warp] < np.count_nonzero(s.exists.reshape(-1, 32), axis=1)[warp]
        for wrong, why in (
            (apart, "threads of a warp wait at different statements"),
            (missing, "threads of the warp never came"),
        ):
            for at in np.flatnonzero(wrong):
                if self.steps[self.waits_at[lanes[at]]].aligned:
                    self.pc = int(self.waits_at[lanes[at]])
                    raise Deadlock(f"a divergent barrier: {why}", int(lanes[at]))


def without(lanes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The lanes that aren't among others; both ascend, others is a part of lanes."""
    keep = np.ones(len(lanes), np.bool_)
    keep[np.searchsorted(lanes, others)] = False
    return lanes[keep]
