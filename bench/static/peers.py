"""bitsandbytes' own GPU kernels, from the CUDA library in its wheel, counted as ours are; peers.csv names those of interest."""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from bench.static import gates, nvcc, sass, tools
from bench.static.gates import Gate, Row
from bench.static.occupancy import capability

PACKAGE = "bitsandbytes"


def library(release: str | None = None) -> Path | None:
    """Of the wheel's CUDA libraries the one of nvcc's release (130 of 13.0), else the newest; None where there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    found = {
        int(name[1]): path
        for folder in folders
        for path in Path(folder).glob("lib*_cuda*.so")
        if (name := re.search(r"_cuda(\d+)\.so$", path.name))
    }
    if not found:
        return None
    release = release or nvcc.release()
    return found.get(int(release.replace(".", "") or 0)) or found[max(found)]


def why_not() -> str:
    """Why its kernels can't be counted here; empty where they can."""
    return tools.why_not() or ("" if library() else f"{PACKAGE} is not installed, or its wheel holds no CUDA library")


def targets() -> list[str]:
    """What its library holds code for: sm_75, sm_80 …"""
    return sorted(set(re.findall(r"\.(sm_\d+\w?)\.cubin", tools.output("cuobjdump", "-lelf", library()))), key=capability)


def cubin(target: str) -> Path:
    """Its code for a target of targets(), taken out of the library once."""
    source = library()
    kept = nvcc.STORE / f"{PACKAGE}-{version(PACKAGE)}-{source.stem}-{target}.cubin"
    if not kept.exists():
        nvcc.STORE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=nvcc.STORE) as folder:
            tools.output("cuobjdump", "-xelf", f".{target}.cubin", source, cwd=Path(folder))
            (fresh,) = Path(folder).iterdir()
            os.replace(fresh, kept)
    return kept


def rows(ops: Sequence[str], target: str) -> list[Row]:
    """Its kernels beside these ops of ours, from its code for the same compute capability; [] where it has none."""
    same = [theirs for theirs in targets() if capability(theirs) == capability(target)]
    table = [gate for gate in gates.read(gates.PEERS) if gate.op in ops]
    if not same or not table:
        return []

    def gate_of(name: str) -> Gate | None:
        return next((gate for gate in table if gate.matches(gate.op, PACKAGE, name, same[0])), None)

    kernels = sorted(sass.kernels(cubin(same[0]), gate_of), key=lambda kernel: (table.index(gate_of(kernel.name)), kernel.name))
    matched = [(kernel, gate_of(kernel.name)) for kernel in kernels]
    return [gates.judge(kernel, gate, gate.op, PACKAGE, same[0]) for kernel, gate in matched]
