"""csrc/README.md, step by step: its files are written into a copy of the tree, its commands run there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "csrc" / "README.md").read_text()
FENCED = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
FILES = {path: text for _, path, text in FENCED if path}
COMMANDS = [line for language, path, text in FENCED if not path and language == "bash" for line in text.splitlines()]


def copied(folder: Path) -> Path:
    """The tracked files as they are now, with the page's."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, tracked):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name, text in FILES.items():
        assert not (folder / name).exists()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def run(command: str, cwd: Path) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", command], cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def test_the_page_has_the_files_that_an_op_needs(tmp_path):
    """As tests/test_structure.py has them; formatted as the house is."""
    mirrors = ("tests/ops/test_axpy.py", "bench/ops/bench_axpy.py")
    rooms = [f"peftk/ops/axpy/{file}.py" for file in ("__init__", "reference", "cpu")]
    assert set(FILES) == {"csrc/ops/axpy/op.h", "csrc/ops/axpy/cpu.cpp", *rooms, *mirrors}
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copy(ROOT / ".clang-format", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    ours = "lint.isort.known-first-party = ['bench', 'peftk']"  # in a checkout ruff sees that for itself
    run(f'ruff check --config "{ours}" . && ruff format --check .', tmp_path)
    if shutil.which("clang-format"):
        run("clang-format --dry-run -Werror csrc/ops/axpy/*", tmp_path)


def test_every_edit_finds_its_place(tmp_path):
    edits = [command for command in COMMANDS if command.startswith("sed ")]
    assert len(edits) == 3
    for name in ("csrc/bindings.cpp", "peftk/ops/__init__.py", "peftk/ops/choices.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for command in edits:
        run(command, tmp_path)
    for name in ("csrc/bindings.cpp", "peftk/ops/__init__.py", "peftk/ops/choices.py"):
        added = set((tmp_path / name).read_text().splitlines()) - set((ROOT / name).read_text().splitlines())
        assert len(added) == 2 and all("axpy" in line for line in added), name


@pytest.mark.full
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_page_step_by_step(tmp_path):
    folder, printed = copied(tmp_path), {}
    for command in COMMANDS:
        printed[command] = run(command, folder)
    shown = next(text for command, text in printed.items() if "peftk info" in command)
    assert re.search(r"cpu +runs: (avx2|scalar)", shown)
    timed = next(text for command, text in printed.items() if "-m bench" in command)
    assert "1024x1024 bf16" in timed and "torch add" in timed
