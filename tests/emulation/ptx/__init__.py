"""An emulator of compiled sm_80 PTX: runs what nvcc and Triton emit, on numpy, with checks that a GPU doesn't make."""

from .counts import Report, Traffic
from .faults import Deadlock, Fault, InFlight, Misaligned, OutOfBounds, Race, Trap, UninitialisedShared, Unsupported
from .memory import Memory
from .program import Program

__all__ = [
    "Deadlock", "Fault", "InFlight", "Memory", "Misaligned", "OutOfBounds", "Program", "Race", "Report", "Traffic", "Trap",
    "UninitialisedShared", "Unsupported",
]  # fmt: skip
