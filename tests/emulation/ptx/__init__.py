"""An emulator of compiled sm_80 PTX: runs what nvcc and Triton emit, on numpy, with checks that a GPU doesn't make."""

from .faults import Deadlock, Fault, InFlight, Misaligned, OutOfBounds, Race, Trap, UninitialisedShared, Unsupported
from .memory import Memory
from .program import Program, Report

__all__ = [
    "Deadlock", "Fault", "InFlight", "Memory", "Misaligned", "OutOfBounds", "Program", "Race", "Report", "Trap",
    "UninitialisedShared", "Unsupported",
]  # fmt: skip
