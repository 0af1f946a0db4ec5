"""The package builds as sdist and wheel, and installs where there is no compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import peftk

ROOT = Path(__file__).resolve().parents[1]
CHECK = """
import sys
sys.meta_path = [f for f in sys.meta_path if "_EditableFinder" not in repr(f)]  # it would lend the checkout's own peftk._C
import peftk, torch
from peftk.native import native
w4 = peftk.quantize_nf4(torch.randn(4, 64))
assert w4.dequantize().shape == (4, 64)
print(peftk.__file__); print(native() is not None); print(peftk.info())
"""


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def install(source: Path, target: Path, **environment: str) -> str:
    """Install without dependencies into a folder of its own, import from there, and return what CHECK prints."""
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(target))
    run(*pip, str(source), cwd=target.parent, **environment)
    return run(sys.executable, "-P", "-c", CHECK, cwd=target.parent, PYTHONPATH=str(target))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder)
    return next(folder.glob("peftk-*.tar.gz"))


def test_sdist_holds_what_a_build_needs(sdist):
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    tracked = subprocess.run(["git", "ls-files", "csrc", "peftk"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert set(tracked) | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"} <= names


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.full
def test_wheel_from_the_sdist_without_nvcc(sdist, tmp_path):
    printed = install(sdist, tmp_path / "site", PEFTK_CMAKE_ARGS="-DPEFTK_CUDA=OFF").splitlines()
    assert printed[0].startswith(str(tmp_path)) and printed[1] == "True"
    assert "does not run: this build found no nvcc" in printed[-2]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.full
def test_compiles_without_a_warning(tmp_path):
    """The CPU kernels on every instruction set."""
    import pybind11

    options = ("-DPEFTK_CUDA=OFF", "-DPEFTK_WARNINGS_AS_ERRORS=ON", f"-DPython_EXECUTABLE={sys.executable}")
    run(
        "cmake", "-S", str(ROOT), "-B", str(tmp_path), "-GNinja", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options, cwd=ROOT
    )
    run("cmake", "--build", str(tmp_path), cwd=ROOT)


def test_installs_without_a_compiler(sdist, tmp_path):
    """The reference runs, and info() says what the build said."""
    printed = install(sdist, tmp_path / "site", CXX=str(tmp_path / "no-compiler-here"))
    assert printed.splitlines()[1] == "False"
    assert "cpu        does not run: the native build failed" in printed


def tool(folder: Path, name: str, prints: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\nprintf '{prints}'\n")
    path.chmod(0o755)
    return path


NVCC_13 = "".join(rf"compute_{gpu}\n" for gpu in (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121))


@pytest.mark.parametrize(
    ("gpus", "wanted", "nvcc", "architectures"),
    [
        (r"8.9\n8.0\n8.9\n", "local", NVCC_13, "80-real;89-real"),
        ("", "local", NVCC_13, "75-real;80-real;90-real;100-real;120"),
        (r"8.9\n", "all", NVCC_13, "75-real;80-real;90-real;100-real;120"),
        (r"13.0\n", "local", NVCC_13, "75-real;80-real;90-real;100-real;120"),  # the driver compiles the last one's PTX for it
        (r"7.0\n", "local", NVCC_13, "75-real;80-real;90-real;100-real;120"),
        ("", "all", r"compute_75\ncompute_80\ncompute_90\n", "75-real;80-real;90"),  # CUDA 11.8
    ],
)
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_cuda_objects_are_for_the_gpus_here_or_for_all(tmp_path, gpus, wanted, nvcc, architectures):
    tool(tmp_path, "nvidia-smi", gpus)
    flags = (f"-DCMAKE_CUDA_COMPILER={tool(tmp_path, 'nvcc', nvcc)}", f"-DPEFTK_GPUS={wanted}")
    command = ("cmake", *flags, "-P", str(ROOT / "csrc" / "cuda" / "architectures.cmake"))
    printed = run(*command, cwd=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert printed.splitlines()[-1] == f"-- {architectures}"


def test_the_version_is_written_once():
    assert re.fullmatch(r"\d+\.\d+\.\d+", peftk.__version__) and peftk.info().versions["peftk"] == peftk.__version__
    asked = run(sys.executable, "setup.py", "-q", "--version", cwd=ROOT, PEFTK_VERSION_LABEL="cu130").split()[-1]
    assert asked == f"{peftk.__version__}+cu130"
    for path in (ROOT / "pyproject.toml", ROOT / "setup.py", ROOT / "CMakeLists.txt"):
        assert f'"{peftk.__version__}"' not in path.read_text(), path
    assert f"## {peftk.__version__}" in (ROOT / "CHANGELOG.md").read_text()
