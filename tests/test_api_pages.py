"""The API reference, built once: every public name is on it, with its docstring."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peftk

ROOT = Path(__file__).resolve().parents[1]
COMMAND = re.search(r"^pdoc .* -o ", (ROOT / "peftk" / "README.md").read_text(), re.MULTILINE)[0]
ROOMS = [f"peftk.{name}" for name in peftk.__all__ if inspect.ismodule(getattr(peftk, name))]  # pdoc finds these by itself
INTEGRATIONS = [f"peftk.integrations.{name}" for name in re.search(r"integrations\.{(.*?)}", COMMAND)[1].split(",")]
MODULES = ["peftk", *ROOMS, "peftk.paging", "peftk.checkpoint", *INTEGRATIONS]


def public(module) -> list[str]:
    """What ``__all__`` names; without one, what the module itself defines."""
    own = [n for n, o in vars(module).items() if not n.startswith("_") and getattr(o, "__module__", "") == module.__name__]
    return list(getattr(module, "__all__", own))


def undocumented() -> list[str]:
    """Public names, and public methods of public classes, without a docstring. Data and constants have none."""
    found = []
    for name in MODULES:
        module = importlib.import_module(name)
        for member in public(module):
            value = getattr(module, member)
            if inspect.ismodule(value) or not (inspect.isclass(value) or inspect.isroutine(value)):
                continue
            if not inspect.getdoc(value) or inspect.getdoc(value).startswith(f"{member}("):  # what a dataclass writes by itself
                found.append(f"{name}.{member}")
    return found


def test_every_public_name_has_a_docstring():
    assert undocumented() == []


def test_every_public_name_is_on_the_built_pages(tmp_path):
    pytest.importorskip("pdoc", reason="pdoc is not installed: pip install 'peftk[docs]'")
    command = f"{sys.executable} -m {COMMAND}{tmp_path}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("*.html"))) < 2 * len(MODULES), "rooms' inner modules are not for users"
    for name in MODULES:
        page = (tmp_path / f"{name.replace('.', '/')}.html").read_text()
        for member in public(importlib.import_module(name)):
            if not inspect.ismodule(getattr(importlib.import_module(name), member)):
                assert f'id="{member}"' in page, f"{name}.{member}"
