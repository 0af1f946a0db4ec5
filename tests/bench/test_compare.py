"""bench/compare.py: ratios with their spread, a verdict beyond the noise, both packages by the same benches."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import compare, report
from bench.limits import Limits
from bench.measure import Row

KEY = ("nf4_linear", "m=1", "peftk")
LIMITS = Limits(10e9, 5e9, 8e9, {torch.bfloat16: 100e9, torch.float32: 50e9})
HERE = report.Provenance("2026-01-02", "abc1234", "some-cpu-2cores", 2, "avx2", dict.fromkeys(report.PACKAGES, "1"))


@pytest.mark.parametrize(
    ("here", "there", "verdict"),
    [
        ([1.0, 1.1, 1.2], [1.1, 1.0, 1.2], "same"),
        ([1.0, 1.1, 1.2], [2.0, 2.1, 2.2], "faster"),
        ([2.0, 2.1, 2.2], [1.0, 1.1, 1.2], "SLOWER"),
        ([1.01, 1.011, 1.012], [1.0, 1.001, 1.002], "same"),  # apart, but by less than LEAST
        ([2.0, 2.1, 0.9], [1.0, 1.1, 1.2], "same"),  # one process of ours was as fast
    ],
)
def test_beyond_the_noise(here: list[float], there: list[float], verdict: str, capsys: pytest.CaptureFixture):
    rows = compare.compare({KEY: here, ("new", "x", "peftk"): [1.0]}, {KEY: there})
    assert [row.verdict for row in rows] == [verdict]
    assert rows[0].low <= rows[0].ratio <= rows[0].high
    assert compare.told(rows, "here", "abc") == (verdict == "SLOWER")
    out = capsys.readouterr().out
    assert f"{rows[0].ratio:.3f}" in out and ("slower: nf4_linear m=1 peftk" in out) == (verdict == "SLOWER")


def test_nothing_compared_is_no_success(capsys: pytest.CaptureFixture):
    assert compare.told([], "here", "abc") == 1
    assert compare.told(compare.compare({KEY: [1.0]}, {KEY: [1.0]}), "here", "abc", ["failed: nf4_linear"]) == 1
    assert "failed: nf4_linear" in capsys.readouterr().out


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits of a checkout; in the second the package says 2."""
    root = tmp_path / "checkout"
    (root / "peftk").mkdir(parents=True)

    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=root, check=True, capture_output=True)

    git("init", "-q")
    for number in (1, 2):
        (root / "peftk" / "__init__.py").write_text(f"NUMBER = {number}\n")
        (root / "setup.py").write_text("open('peftk/_C.so', 'w')\n")
        git("add", ".")
        git("commit", "-qm", str(number))
    return root


def test_both_sides_take_turns(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    turns = []

    def child(folder: Path, names, flags) -> dict:
        program = "import peftk; print(peftk.NUMBER)"
        number = int(subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True).stdout)
        turns.append(number)
        assert (folder / "bench").resolve() == repository / "bench" and (number == 2 or (folder / "peftk" / "_C.so").exists())
        failed = {"newest": "AttributeError: lion_step"} if number == 1 else {}
        return {"rows": [[*KEY, 10.0 * number]], "failed": failed}

    monkeypatch.setattr(compare, "child", child)
    status = compare.measured("HEAD~1", ["nf4_linear", "newest"], 2, {"threads": 1}, repository)
    assert turns == [2, 1, 2, 1] and status == 1
    out = capsys.readouterr().out
    assert "0.500" in out and "SLOWER" in out and "not compared: HEAD~1 can't run newest: AttributeError: lion_step" in out
    left = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True).stdout
    assert len(left.splitlines()) == 1
    with pytest.raises(SystemExit, match="--compare nonsense: .*nonsense"):
        compare.measured("nonsense", ["nf4_linear"], 1, {"threads": 1}, repository)


def test_a_build_that_fails_says_why(tmp_path: Path):
    (tmp_path / "setup.py").write_text("raise SystemExit('no compiler')\n")
    with pytest.raises(SystemExit, match="can't be built: no compiler"):
        compare.build(tmp_path)


def test_a_childs_rows_are_of_the_package_beside_it(tmp_path: Path):
    folder = compare.side(tmp_path / "here", report.ROOT, report.ROOT)
    flags = {"size": 64, "repeat": 1, "threads": 1}
    done = compare.child(folder, ["blockwise8_dequantize", "nonsense"], flags)
    assert done["rows"] and all(
        name == "blockwise8_dequantize" and who == "peftk" and ms > 0 for name, _, who, ms in done["rows"]
    )
    assert list(done["failed"]) == ["nonsense"]
    asked = {"names": [], "out": str(tmp_path / "x"), "package": str(tmp_path), **flags}
    with pytest.raises(SystemExit, match="expected the package in"):
        compare.run_child(json.loads(json.dumps(asked)))


def test_recorded_rows(tmp_path: Path, capsys: pytest.CaptureFixture):
    ours, peer = Row("m=1", "peftk", 0.002, 0.0021, 20, p10=0.0019), Row("m=1", "peer", 0.009, 0.009, 20, ratio=4.5)
    report.record("nf4_linear", [ours, peer], LIMITS, replace(HERE, commit="0ld0000"), tmp_path)
    slower = replace(ours, p50=0.003, p10=0.0029, p90=0.0031)
    report.record("nf4_linear", [slower, peer], LIMITS, HERE, tmp_path)
    assert compare.recorded("0ld", folder=tmp_path) == 1
    out = capsys.readouterr().out
    assert "0.667" in out and "0.613 to 0.724  SLOWER" in out and "peer" not in out
    assert compare.recorded("abc1234", "0ld", folder=tmp_path) == 0
    with pytest.raises(SystemExit, match="expected a commit with recorded rows, one of 0ld0000, abc1234"):
        compare.recorded("fff", folder=tmp_path)
