"""``import bitsandbytes`` alone takes over where peftk is installed, and never fails on peftk's account."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peftk.integrations.bitsandbytes import entry
from peftk.native import native, why_not_native

ROOT = Path(__file__).resolve().parents[2]
ENTRY = Path(entry.__file__).parent


def run(code: str, *path: Path) -> subprocess.CompletedProcess:
    """In a process of its own, with these folders before everything that is installed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), entry.SWITCH: "1"}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A site folder as an installation leaves it, but for peftk itself: the entry's package and the metadata that name it."""
    pytest.importorskip("bitsandbytes")
    declared = re.search(
        r'(?m)^\[project\.entry-points\."bitsandbytes\.backends"\]\n(\w+) = "(.+)"', (ROOT / "pyproject.toml").read_text()
    )
    site = tmp_path / "site"
    (site / "peftk-0.0.dist-info").mkdir(parents=True)
    (site / "peftk-0.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peftk\nVersion: 0.0\n")
    (site / "peftk-0.0.dist-info" / "entry_points.txt").write_text(
        "[bitsandbytes.backends]\n{} = {}\n".format(*declared.groups())
    )
    (site / "peftk_bitsandbytes").symlink_to(ENTRY)
    return site


def test_the_import_alone_takes_over(installed: Path):
    if native() is None:
        pytest.skip(why_not_native())
    code = """
import bitsandbytes as bnb, torch
layer = bnb.nn.Linear4bit(80, 8, quant_type="nf4").to("cpu").eval()
before = layer.weight.data.clone()
layer(torch.randn(2, 80))
assert torch.equal(layer.weight.data, before)
print(bnb.matmul_4bit.__module__, "|", bnb.__version__)
"""
    done = run(code, installed, ROOT)
    assert done.stdout.startswith("peftk.integrations.bitsandbytes.products |")
    assert "peftk" not in done.stderr and "previously registered" not in done.stderr


def test_a_peftk_that_cannot_be_imported(installed: Path, tmp_path: Path):
    """One warning, and bitsandbytes as it is."""
    (tmp_path / "peftk").mkdir()
    (tmp_path / "peftk" / "__init__.py").write_text("raise RuntimeError('torch is too new')")
    code = "import bitsandbytes as bnb; print(bnb.matmul_4bit.__module__)"
    done = run(code, installed, tmp_path)
    assert done.stdout.strip() == "bitsandbytes.autograd._functions"
    assert done.stderr.count("bitsandbytes runs without peftk") == 1 and "torch is too new" in done.stderr


def test_an_exception_stays_inside(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    import peftk.integrations.bitsandbytes as backend

    def fail(cuda: bool):
        raise KeyError("anything")

    monkeypatch.setattr(backend, "enable", fail)
    monkeypatch.setenv(entry.SWITCH, "1")
    entry.register()
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "anything" in caplog.text
