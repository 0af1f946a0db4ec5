"""bench/sweep: every size is there, its file comes back, its pictures appear whole."""

from pathlib import Path

import pytest
import torch

import peftk.atomic
from bench import report
from bench.limits import Limits
from bench.sweep import plot, sweep

LIMITS = Limits(10e9, 5e9, 8e9, {torch.bfloat16: 100e9, torch.float32: 50e9})
HERE = report.Provenance("2026-01-02", "abc1234", "some-cpu-2cores", 2, "avx2", dict.fromkeys(report.PACKAGES, "1"))


@pytest.fixture(scope="module")
def lines() -> list[dict[str, str]]:
    """A sweep of two shapes, timed once each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "LEAST", 1)
        patch.setattr(sweep, "BUDGET", 0.0)
        done = list(sweep.sweep(LIMITS, [(64, 128), (128, 64)], [1, 128], progress=False))
    return [sweep.cells(point, row, LIMITS, HERE) for point, rows in done for row in rows]


def test_every_size_is_swept(lines: list[dict[str, str]]):
    assert {(line["n"], line["k"]) for line in lines} == {("64", "128"), ("128", "64")}
    ours = [(line["pass"], line["n"], line["m"]) for line in lines if line["who"] == "peftk"]
    assert len(ours) == len(set(ours)) == 2 * 2 * 2
    assert all(float(line["p50_ms"]) > 0 and float(line["share"]) > 0 for line in lines if line["who"] == "peftk")
    dense = {line["who"] for line in lines if "dense" in line["who"]}
    assert dense == {"torch dense", "HF peft on dense bf16"}
    packed = {line["m"] for line in lines if line["who"] == "bitsandbytes packed"}
    assert packed == {"1"}  # not where it is known to lose


def test_the_shapes_and_rows_asked_for():
    numbers = {side for shape in sweep.SHAPES for side in shape}
    assert min(numbers) == 576 and max(numbers) == 14336
    assert sweep.ROWS[0] == 1 and sweep.ROWS[-1] == 4096


def test_a_file_comes_back(tmp_path: Path, lines: list[dict[str, str]]):
    path = tmp_path / "sweep.csv"
    report.write_csv(path, sweep.COLUMNS, lines)
    assert sweep.read(path) == lines
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="sweep.csv: expected a sweep's columns date"):
        sweep.read(path)


def test_a_forced_sweep_has_its_own_file(monkeypatch: pytest.MonkeyPatch):
    assert sweep.results_file("some-cpu").name == "some-cpu-sweep.csv"
    for name, value in sweep.isa.FORCED["avx2"].items():
        monkeypatch.setenv(name, value)
    assert sweep.results_file("some-cpu").name == "some-cpu-sweep-avx2.csv"


def test_the_summary_names_peers_and_ratios(lines: list[dict[str, str]]):
    text = sweep.summary(lines[:4])
    assert text.startswith("  forward") and "x bitsandbytes" in text and "of the limit" in text


def test_series_are_in_order_and_without_gaps():
    def line(m: str, share: str, who: str = "peftk", n: str = "64") -> dict[str, str]:
        return {"n": n, "k": "128", "m": m, "who": who, "share": share}

    lines = [line("16", "0.5"), line("2", "0.25"), line("4", ""), line("8", "1", "peer"), line("8", "1", n="65")]
    assert plot.series(lines, ("64", "128"), "peftk", "share", 100.0) == [(2, 25.0), (16, 50.0)]


def test_pictures_are_png_and_appear_whole(tmp_path: Path, lines: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib")
    written = plot.draw(lines, tmp_path / "pictures")
    assert [path.name for path in written] == [
        "sweep-forward-time.png",
        "sweep-forward-share.png",
        "sweep-forward-backward-time.png",
        "sweep-forward-backward-share.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in written)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == sorted(path.name for path in written)
    before = written[0].read_bytes()
    monkeypatch.setattr(plot, "picture", lambda *_: b"half a picture")

    def no_replace(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(peftk.atomic.os, "replace", no_replace)
    with pytest.raises(OSError, match="the disk is full"):
        plot.draw(lines, tmp_path / "pictures")
    assert written[0].read_bytes() == before and len(list((tmp_path / "pictures").iterdir())) == 4


def test_nothing_to_draw(tmp_path: Path):
    with pytest.raises(ValueError, match="expected the points of a sweep, got none"):
        plot.draw([], tmp_path)
