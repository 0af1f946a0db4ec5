"""The programs that read cubins: cuobjdump and nvdisasm from the PATH or from Triton's wheel, c++filt from binutils."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

_SCOPE = re.compile(r"(?:\b(?!std::)\w+::|\(anonymous namespace\)::)+")
READERS = ("cuobjdump", "nvdisasm", "c++filt")


@cache
def find(name: str) -> Path | None:
    """A program of READERS; None where it is neither on the PATH nor in Triton's wheel."""
    if on_path := shutil.which(name):
        return Path(on_path)
    spec = importlib.util.find_spec("triton")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (found := Path(place) / "backends" / "nvidia" / "bin" / name).exists():
            return found
    return None


def why_not() -> str:
    """Why no cubin can be read here; empty where it can."""
    missing = [name for name in READERS if find(name) is None]
    return f"no {', '.join(missing)}: neither on the PATH nor in Triton's wheel" if missing else ""


def output(name: str, *arguments: str | Path, cwd: Path | None = None, typed: str | None = None) -> str:
    """What a program prints. RuntimeError with its own words where it fails."""
    program = find(name)
    if program is None:
        raise RuntimeError(why_not())
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, input=typed)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def demangled(names: Sequence[str]) -> dict[str, str]:
    """Mangled name -> C++ name without its parameters, and without namespaces but the standard's: ``copy<float, 4>``."""
    plain = output("c++filt", "--no-params", typed="\n".join(names)).splitlines()
    return {name: _SCOPE.sub("", short).removeprefix("void ").strip() for name, short in zip(names, plain, strict=True)}
