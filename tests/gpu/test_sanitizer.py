"""compute-sanitizer over every op's CUDA kernels: bounds, races in shared memory, unwritten memory that is read, barriers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpu.calls import CPU, GPU, TYPICAL, Place
from peftk.native import why_not_native

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ERRORS = 9  # exit code where the tool found some
LIMIT = 1800  # s


def watched(prefix: list[str], op: str, place: Place) -> None:
    """Run gpu/sanitized.py behind ``prefix``; AssertionError with all that was said where it fails. torch's pools are off: inside
    one, memcheck and initcheck see no tensor's end and no fresh memory."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*prefix, sys.executable, "-m", "gpu.sanitized", op, place.device, place.implementation]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    assert re.search(rf"^{op} by {place}: \d\d+ calls$", done.stdout, re.MULTILINE), f"not to its end: {done.stdout}{done.stderr}"


def sanitizer(tool: str, program: str) -> list[str]:
    return [program, "--tool", tool, "--error-exitcode", str(ERRORS), "--print-limit", "20"]


@pytest.mark.gpu
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("op", list(TYPICAL))
def test_sanitizer_finds_nothing(op: str, tool: str):
    cuda, program = GPU[0], shutil.which("compute-sanitizer")
    if reason := cuda.why_not(op):
        pytest.skip(reason)
    if program is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    watched(sanitizer(tool, program), op, cuda)


# ---- without a GPU: the script, and what is made of a sanitizer's answer -----------------------------------------------------


@pytest.mark.skipif(bool(why_not_native()), reason=why_not_native() or "native")
@pytest.mark.parametrize("op", list(TYPICAL))
def test_the_script_runs_to_its_end(op: str):
    watched([], op, CPU)


def pretend(folder: Path, body: str) -> str:
    """A program in compute-sanitizer's place; ``rest`` is the command that it watches."""
    program = folder / "compute-sanitizer"
    start = "import os, subprocess, sys\nat = sys.argv.index(sys.executable)\noptions, rest = sys.argv[1:at], sys.argv[at:]"
    program.write_text(f"#!{sys.executable}\n{start}\n{body}\n")
    program.chmod(0o755)
    return str(program)


def test_errors_found_are_a_failure(tmp_path: Path):
    program = pretend(tmp_path, "subprocess.run(rest); print('Invalid __global__ read'); sys.exit(int(options[3]))")
    with pytest.raises(AssertionError, match=r"exit code 9\s+nf4_quantize by cpu-cpu: \d+ calls\s+Invalid __global__ read"):
        watched(sanitizer("memcheck", program), "nf4_quantize", CPU)


def test_a_script_that_did_not_run_is_a_failure(tmp_path: Path):
    program = pretend(tmp_path, "print('no kernels were launched')")
    with pytest.raises(AssertionError, match="not to its end: no kernels were launched"):
        watched(sanitizer("memcheck", program), "nf4_quantize", CPU)


def test_the_tool_and_the_allocator_are_chosen(tmp_path: Path):
    body = "print(*options, os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'], 'nf4_quantize by cpu-cpu: 99 calls', sep='\\n')"
    watched(sanitizer("racecheck", program := pretend(tmp_path, body)), "nf4_quantize", CPU)
    assert sanitizer("racecheck", program)[1:5] == ["--tool", "racecheck", "--error-exitcode", "9"]
    without = pretend(tmp_path, body.replace("os.environ", "{}"))
    with pytest.raises(AssertionError, match="KeyError"):
        watched(sanitizer("racecheck", without), "nf4_quantize", CPU)


def test_an_op_that_cannot_run_is_a_failure():
    with pytest.raises(AssertionError, match="exit code 1(.|\n)*peftk.ops.nf4_quantize can't run: cuda: "):
        watched([], "nf4_quantize", Place("cpu", "cuda"))
