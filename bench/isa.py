"""Runs in which everyone is held to a smaller instruction set than the processor has; and the goal there: not slower.

bitsandbytes can be held to it in part only: its packed kernel needs AVX512-BF16 and is left out, but the C function that decodes
a weight asks the processor itself and uses AVX-512 all the same. Its rows say so.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from bench.goals import Goal
from bench.measure import Case

FORCED = {
    "avx2": {
        "PEFTK_CPU_ISA": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}
BITSANDBYTES_NOTE = "decodes with AVX-512 all the same"


def forced() -> str:
    """The instruction set that this process was started with, empty where it has the processor's own."""
    return next((isa for isa, variables in FORCED.items() if variables.items() <= os.environ.items()), "")


def start_again(isa: str, argv: Sequence[str]) -> None:
    """Replace this process by one in whose environment ``isa`` is forced: torch and oneDNN read it when they load."""
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "bench", *argv], os.environ | FORCED[isa])


def goals_when_forced(case: Case) -> Case:
    """The case with the goal of a forced instruction set, where it has a peer that is or stands on bitsandbytes."""
    there = [c.who for c in case.candidates if "bitsandbytes" in c.who and c.run is not None]
    return replace(case, goals=tuple(Goal(who, 1) for who in there)) if there else case
