"""nvcc, ahead of time: csrc/ops/<op>/cuda*.cu -> PTX or cubin, kept under build/ by what they were made from."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STORE = ROOT / "build" / "static"
TARGETS = ("sm_75", "sm_80", "sm_90a", "sm_100a", "sm_120a")  # Turing, Ampere, Hopper, Blackwell for servers, for desks
FLAGS = ("-std=c++17", "-O3", "-fmad=false", f"-I{ROOT / 'csrc'}")  # as CMakeLists.txt has them; products are rounded before sums


@cache
def find_nvcc() -> Path | None:
    """nvcc on the PATH, else the one that the package nvidia-cuda-nvcc installs; None where there is neither."""
    if on_path := shutil.which("nvcc"):
        return Path(on_path)
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for candidate in sorted(Path(place).glob("cu*/bin/nvcc"), reverse=True):
            return candidate
    return None


def why_not() -> str:
    """Why nothing can be compiled here; empty where it can."""
    return "" if find_nvcc() else "no nvcc: neither on the PATH nor from the package nvidia-cuda-nvcc"


def compiled(source: Path, target: str, form: str = "cubin") -> Path:
    """``source`` compiled for a target of TARGETS, as "ptx" or "cubin". RuntimeError with nvcc's own words where it can't be."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError(why_not())
    made = STORE / f"{source.parent.name}-{source.stem}-{target}-{_key(source, target)}.{form}"
    if made.exists():
        return made
    STORE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=STORE) as folder:
        fresh = Path(folder) / made.name
        command = [str(nvcc), *FLAGS, f"-arch={target}", f"-{form}", str(source), "-o", str(fresh)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} for {target}: {' '.join(command)}\n{done.stderr[-4000:]}")
        os.replace(fresh, made)
    return made


def _key(source: Path, target: str) -> str:
    """Of the source, every header it may include, the flags and the compiler."""
    digest = hashlib.sha256(f"{FLAGS} {target} {_version()}".encode())
    headers = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh") and "cpu" not in p.parts]
    for path in [source, *sorted(headers)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def release() -> str:
    """ "13.0"; empty where there is no nvcc."""
    return re.search(r"release (\d+\.\d+)", _version())[1] if find_nvcc() else ""


@cache
def _version() -> str:
    return subprocess.run([str(find_nvcc()), "--version"], capture_output=True, text=True).stdout
