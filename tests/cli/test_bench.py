"""peftk bench: the checkout's benches, or what to do without one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import peftk
from peftk.cli import bench, main, parser

ROOT = Path(__file__).resolve().parents[2]


def test_everything_is_passed_on(monkeypatch: pytest.MonkeyPatch):
    asked = []

    class Done:
        returncode = 3

    monkeypatch.setattr(bench.subprocess, "run", lambda command, cwd: asked.append((command, cwd)) or Done())
    assert main(["bench", "nf4_linear", "--repeat", "3", "--help"]) == 3
    assert asked == [([sys.executable, "-m", "bench", "nf4_linear", "--repeat", "3", "--help"], ROOT)]


def test_an_installed_package_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path):
    monkeypatch.setattr(peftk, "__file__", str(tmp_path / "site-packages" / "peftk" / "__init__.py"))
    assert main(["bench", "--record"]) == 2
    error = capsys.readouterr().err
    assert "peftk bench: error: the benches belong to a checkout" in error and "pip install -e" in error


def test_no_other_command_takes_unknown_flags(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["info", "--nonsense"])
    assert exit.value.code == 2 and "unrecognized arguments: --nonsense" in capsys.readouterr().err
    arguments = parser().parse_args(["info"])
    assert not hasattr(arguments, "rest")
