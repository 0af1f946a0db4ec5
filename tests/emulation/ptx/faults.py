"""What a kernel can do wrong, each with where: kernel, instruction, line of PTX, block, thread."""

from __future__ import annotations

Triple = tuple[int, int, int]


class Unsupported(Exception):
    """A line of PTX that the emulator doesn't know."""

    def __init__(self, instruction: str, line: int, why: str = ""):
        super().__init__(f"line {line}: {instruction}" + (f" ({why})" if why else ""))
        self.instruction, self.line = instruction, line


class Fault(Exception):
    """An error of the running kernel; ``lane`` is a thread's number within its batch until ``locate`` says which that is."""

    def __init__(self, detail: str, lane: int | None = None):
        super().__init__(detail)
        self.detail, self.lane = detail, lane
        self.kernel, self.instruction, self.line = "", "", 0
        self.block: Triple | None = None
        self.thread: Triple | None = None

    def locate(self, kernel: str, instruction: str, line: int, block: Triple | None, thread: Triple | None) -> Fault:
        """The same fault with its place."""
        self.kernel, self.instruction, self.line, self.block, self.thread = kernel, instruction, line, block, thread
        return self

    def __str__(self) -> str:
        if not self.kernel:
            return self.detail
        return f"{self.kernel}, block {self.block}, thread {self.thread}, line {self.line}: {self.instruction}: {self.detail}"


class OutOfBounds(Fault):
    """An access outside every allowed range, or a store to a read-only one."""


class Misaligned(Fault):
    """An address that isn't a multiple of the access's size."""


class UninitialisedShared(Fault):
    """Shared bytes that no thread of the block has written."""


class Race(Fault):
    """Two threads touch a byte, one of them writes it, and nothing orders them."""


class InFlight(Race):
    """Shared bytes that a cp.async is still filling."""


class Deadlock(Fault):
    """Threads wait for others that can't come."""


class Trap(Fault):
    """The kernel executed ``trap``."""
