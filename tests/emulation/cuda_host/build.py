"""g++ builds csrc/ops/*/cuda*.cu against the shim of this folder: a pybind11 module under build/, kept by its ingredients."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
STORE = ROOT / "build" / "cuda_host"
FLAGS = (
    "-std=c++17", "-O1", "-g", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-DPEFTK_CUDA_HOST", "-Wall", "-Werror",
    "-Wno-unknown-pragmas", "-Wno-attributes",
)  # fmt: skip
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
SHIM = (HERE / "fibers.cpp",)


def why_not() -> str:
    """Why nothing can be built here; empty where it can."""
    if not shutil.which("g++"):
        return "no g++"
    return "" if importlib.util.find_spec("pybind11") else "pybind11 is not installed"


def op_sources() -> list[Path]:
    """What the module of the ops is made of."""
    return [*sorted((ROOT / "csrc/ops").glob("*/cuda*.cu")), *sorted((ROOT / "csrc/format").glob("*.cpp")), HERE / "bindings.cpp"]


def module(sources: Sequence[Path] | None = None, name: str = "cuda_host", sanitize: bool = False) -> types.ModuleType:
    """The module ``name`` of these sources (else the ops') and the shim. RuntimeError with g++'s own words where it can't be."""
    made = built([*(op_sources() if sources is None else sources), *SHIM], name, sanitize)
    spec = importlib.util.spec_from_file_location(name, made)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def built(sources: Sequence[Path], name: str, sanitize: bool = False) -> Path:
    """The shared object of these sources."""
    flags = (*FLAGS, *(SANITIZE if sanitize else ()), *_includes())
    folder = STORE / ("sanitize" if sanitize else "plain")
    folder.mkdir(parents=True, exist_ok=True)
    headers = _digest(_headers(), *flags)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _object(source, flags, folder, headers), sources))
    made = folder / f"{name}-{_digest(objects)}.so"
    if not made.exists():
        _run(["g++", "-shared", *flags, *map(str, objects), "-ldl"], made)
    return made


def _object(source: Path, flags: Sequence[str], folder: Path, headers: str) -> Path:
    made = folder / f"{source.parent.name}-{source.stem}-{_digest([source], headers)}.o"
    if not made.exists():
        _run(["g++", *flags, "-x", "c++", "-c", str(source)], made)
    return made


def _run(command: list[str], made: Path) -> None:
    """Into a temporary folder first, so that runs side by side never see half a file."""
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        fresh = Path(folder) / made.name
        done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
        os.replace(fresh, made)


def _includes() -> tuple[str, ...]:
    import pybind11

    return tuple(f"-I{p}" for p in (ROOT / "csrc", HERE, pybind11.get_include(), sysconfig.get_paths()["include"]))


def _headers() -> list[Path]:
    ours = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh") and "cpu" not in p.relative_to(ROOT).parts]
    return [*sorted(ours), ROOT / "csrc/cpu/isa.h", *sorted(HERE.glob("*.h"))]


def _digest(paths: Sequence[Path], *more: str) -> str:
    digest = hashlib.sha256(repr(more).encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
