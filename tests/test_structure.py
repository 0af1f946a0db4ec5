"""The house rules that a machine can check: who may import whom, rooms and their mirrors, one fact in one place, file sizes."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "peftk"
TEXT = {".py", ".h", ".cpp", ".cu", ".cuh"}

# What a room may import beside itself; `native`, `progress`, `atomic`, `replaced`, `shards`, `files` are tools: they import none.
ALLOWED = {
    "format": set(),
    "native": set(),
    "progress": set(),
    "atomic": set(),
    "replaced": set(),
    "shards": set(),
    "files": set(),
    "version": set(),
    "ops": {"format", "native"},
    "paging": {"format", "native"},
    "optim": {"ops", "paging", "format", "native", "shards"},
    "info": {"ops", "native", "replaced", "version"},
    "nn": {"ops", "format", "progress", "shards"},
    "methods": {"nn", "ops", "format", "progress", "shards"},
    "checkpoint": {"methods", "nn", "format", "atomic", "shards", "files"},
    "integrations": {
        "methods",
        "nn",
        "ops",
        "format",
        "native",
        "checkpoint",
        "atomic",
        "progress",
        "info",
        "replaced",
        "shards",
        "files",
    },
    "streaming": {"methods", "nn", "ops", "format", "checkpoint", "atomic", "progress"},
    "planner": {"methods", "nn", "ops", "optim", "atomic"},
    "cli": {"planner", "methods", "nn", "ops", "format", "checkpoint", "integrations", "optim", "paging", "atomic", "progress"}
    | {"info", "files", "streaming"},
}
OPS = sorted(p.name for p in (PACKAGE / "ops").iterdir() if (p / "__init__.py").exists())


def python_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


def sources() -> list[Path]:
    files = [p for folder in ("csrc", "peftk", "tests", "bench") for p in (ROOT / folder).rglob("*") if p.suffix in TEXT]
    return sorted(p for p in files if "__pycache__" not in p.parts)


def imports(path: Path) -> list[str]:
    """Dotted names under peftk that a file imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in names if name.split(".")[0] == "peftk"]


@pytest.mark.parametrize("path", python_files(PACKAGE), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path: Path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return
    assert room in ALLOWED, f"{path}: a new room; add it to ALLOWED with what it may import"
    used = {name.split(".")[1] for name in imports(path) if "." in name}
    assert used - {room} <= ALLOWED[room], f"{path} imports {sorted(used - {room} - ALLOWED[room])}"


@pytest.mark.parametrize("op", OPS)
def test_an_op_uses_no_other_ops_kernel(op: str):
    """But a reference, an autograd, or a version for a backend composed of another op may use that op's own of that name."""
    for path in python_files(PACKAGE / "ops" / op):
        for name in imports(path):
            parts = name.split(".")
            if len(parts) > 3 and parts[1] == "ops" and parts[2] in OPS and parts[2] != op:
                allowed = {"reference", "autograd", path.stem}
                public = parts[3] not in ("cpu", "cuda", "triton_kernel", "reference", "autograd")
                assert public or parts[3] in allowed, f"{path} imports {name}"


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_mirrors(op: str):
    room = PACKAGE / "ops" / op
    for file in ("__init__.py", "reference.py", "cpu.py"):
        assert (room / file).exists()
    assert "TABLE" in (room / "__init__.py").read_text()
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").exists()
    assert (ROOT / "bench" / "ops" / f"bench_{op}.py").exists()


def test_native_ops_have_a_python_room():
    for folder in (ROOT / "csrc" / "ops").iterdir():
        assert folder.name in OPS and (folder / "op.h").exists() and (folder / "cpu.cpp").exists()
        assert f"PEFTK_OP({folder.name})" in (ROOT / "csrc" / "bindings.cpp").read_text()


@pytest.mark.parametrize("op", OPS)
def test_cuda_kernels_have_a_python_side(op: str):
    sources, side = list((ROOT / "csrc" / "ops" / op).glob("cuda*.cu")), PACKAGE / "ops" / op / "cuda.py"
    assert bool(sources) == side.exists()
    listed = re.findall(r"PEFTK_CUDA_OP\((\w+)\);", (ROOT / "csrc" / "bindings_cuda.h").read_text())
    ours = [name for name in listed if max((o for o in OPS if name.startswith(o)), key=len) == op]
    defined = [name for s in sources for name in re.findall(rf"^void ({op}\w*)\(", s.read_text(), re.M)]
    assert sorted(ours) == sorted(defined), "bindings_cuda.h lists what the files define"
    in_table = re.search(r"\bcuda\.[A-Z]+\b", (PACKAGE / "ops" / op / "__init__.py").read_text())
    assert bool(sources) == bool(in_table)


@pytest.mark.parametrize("room", ["format", "nn", "methods", "planner", "streaming", "cli"])
def test_tests_mirror_the_package(room: str):
    """tests/<room>/test_<file>.py belongs to peftk/<room>/<file>.py."""
    for test in (ROOT / "tests" / room).glob("test_*.py"):
        subject = PACKAGE / room / test.name.removeprefix("test_")
        assert subject.exists(), f"{test} has no {subject}"


@pytest.mark.parametrize(
    ("fact", "places"),
    [
        (r"0?\.6961928", {"csrc/format/nf4.h", "peftk/format/code4.py"}),  # NF4's values
        (r"1\.b239b2p-1", {"csrc/format/nf4.h", "peftk/format/code4.py"}),  # NF4's thresholds
        (r"0?\.20833333", {"csrc/format/nf4.h", "peftk/format/code4.py"}),  # FP4's thresholds
        (r"(?i)0xD2511F53", {"csrc/format/philox.h", "peftk/ops/philox_dropout/reference.py"}),  # Philox
    ],
)
def test_one_fact_in_one_place(fact: str, places: set[str]):
    found = {str(p.relative_to(ROOT)) for p in sources() if "tests" not in p.parts and re.search(fact, p.read_text())}
    assert found == places


def test_kernels_know_no_framework():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in TEXT:
            included = re.findall(r'#include\s+[<"](\S+)[>"]', path.read_text())
            assert not [name for name in included if name.startswith(("torch/", "ATen/", "c10/"))], path
            if not path.name.startswith("bindings"):
                assert not [name for name in included if name.startswith("pybind11")], path


def test_tool_sheds_know_no_op():
    for shed in ("cpu", "cuda", "format"):
        for path in (ROOT / "csrc" / shed).glob("*"):
            assert '#include "ops/' not in path.read_text(), path


def test_methods_name_no_backend():
    for path in python_files(PACKAGE / "methods"):
        assert not re.search(r"\b(peftk\.use|peftk\.native|bitsandbytes|cuda|triton|avx)\b", path.read_text()), path


def test_no_file_outgrows_a_reader():
    for path in sources():
        lines = path.read_text().count("\n")
        assert lines <= 450, f"{path}: {lines} lines"


def test_no_swallowed_errors_and_no_magic():
    for path in python_files(PACKAGE):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno}: bare except"
                swallowed = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
                assert not swallowed, f"{path}:{node.lineno}: an exception is swallowed"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "globals", f"{path}:{node.lineno}: globals()"
            if isinstance(node, ast.ImportFrom):
                assert "*" not in [alias.name for alias in node.names], f"{path}:{node.lineno}: import *"


@pytest.mark.parametrize("package", ["transformers", "peft", "bitsandbytes", "tqdm", "matplotlib", "gguf", "tokenizers"])
def test_optional_packages_are_imported_where_used(package: str):
    """No module of ours imports an extra at its top, so `import peftk` needs the core dependencies only. integrations/<package>
    may import its package, since no module of ours imports that room."""
    for path in python_files(PACKAGE):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[:2] == ("integrations", package):
            continue
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert package not in {name.split(".")[0] for name in names}, f"{path}:{node.lineno}"


def test_ruff_is_clean():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("clang-format") is None, reason="clang-format is not installed")
def test_clang_format_is_clean():
    files = [str(p) for p in (ROOT / "csrc").rglob("*") if p.suffix in TEXT]
    done = subprocess.run(["clang-format", "--dry-run", "-Werror", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What a message says to do: what was expected, what there is, or an imperative. Names of what is passed on from elsewhere.
REMEDY = re.compile(
    r"expected|needed|\bneeds?\b|attached are|there are|instead|goes on|is for |works on |pip install|finished files|can be"
    r"|[;:,] (or )?(use|give|leave|raise|lower|add|cut|set|install|run|make|save|take|put|prepare|attach|detach|shorten)\b"
    r"|[;:,] (pass|start)\b"
    r"|; (see|exclude_modules|unmerge|nothing was|or one of)|layers before it have changed|Merge in memory"
)
PASSED_ON = {"error", "reason", "reasons", "why", "message", "text", "told"}


def test_every_error_says_what_to_do():
    for path in python_files(PACKAGE):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            inside = list(ast.walk(node.exc))
            names = {n.id for n in inside if isinstance(n, ast.Name)} | {n.attr for n in inside if isinstance(n, ast.Attribute)}
            said = " ".join(n.value for n in inside if isinstance(n, ast.Constant) and isinstance(n.value, str))
            kind = getattr(node.exc.func, "id", "")
            internal = kind in ("AssertionError", "AttributeError") or names & {"why_not_native", "strerror"}
            assert REMEDY.search(said) or names & PASSED_ON or internal, (
                f"{path}:{node.lineno}: only says what is wrong: {said!r}"
            )
