"""The page of results: out of the recorded rows, one file, nothing asked of the network."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from bench import memory_plan, page, pictures, report
from bench.goals import Verdict
from bench.limits import Limits
from bench.measure import Row
from bench.page import results
from bench.sweep import plot, sweep
from peftk import planner
from peftk.cli import memory

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")
VOID = {"meta", "path", "use", "rect", "img", "br", "link", "line", "circle", "polygon", "image"}
HERE = report.Provenance("2026-01-02", "abc1234", "some-cpu-2cores", 2, "avx2", dict.fromkeys(report.PACKAGES, "1"))
LIMITS = Limits(10e9, 5e9, 8e9, {torch.bfloat16: 100e9, torch.float32: 50e9})


class Reader(HTMLParser):
    """Every element closed, ids, and all that an attribute refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.refers: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.note(attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.note(attributes)

    def note(self, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        self.refers += [
            value for name, value in attributes if name in ("href", "xlink:href", "src", "srcset", "action", "poster")
        ]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def predicted():
    """The planner is asked elsewhere."""
    plans = [planner.Plan({"weights, 4 bits": (i + 1) * 10**9}, "loss", {}) for i in range(len(pictures.MODELS))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "predictions", lambda: dict.fromkeys(pictures.TRAININGS.values(), plans))
        patch.setattr(memory, "qlora_bars", lambda: [("7B", plans[0]), ("13B", plans[1])])
        yield


@pytest.fixture(scope="module")
def text(predicted) -> str:
    return page.page.html()


def test_it_stands_by_itself(text: str):
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    assert all(target.startswith("#") for target in reader.refers) and {t[1:] for t in reader.refers} <= set(reader.ids)
    assert len(set(reader.ids)) == len(reader.ids)
    assert not re.search(r"<(script|link|iframe|img)\b|@import|url\((?!#)", text)
    outside = set(re.findall(r"https?://[^\s\"'<)]+", text)) - {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not outside and 'name="viewport"' in text and "prefers-color-scheme: dark" in text


def test_it_holds_every_recorded_case(text: str):
    reader = Reader()
    reader.feed(text)
    told = " ".join(reader.text)
    found = results.cases()
    assert len(found) > 100
    for case in found:
        assert case.name in told and case.machine in told and case.stamp in told
    for who, wins, points in results.standing(pictures.sweeps()[0]):
        assert f"ahead of {who} in " in told and points >= wins
    assert (
        "P-Tuning v2" in told
        and "QLoRA, measured" in told
        and f"{results.verdicts(found)['missed']}goals missed" in "".join(reader.text)
    )


def test_where_others_are_ahead(tmp_path: Path):
    goal = Verdict(">= 1x fast", "0.50x", False)
    ours = Row("m=1", "peftk", 0.002, 0.003, 20, verdicts=(goal, Verdict("<= 9 us", "8 us", True)), p10=0.001)
    rows = [ours, Row("m=1", "fast", 0.001, 0.001, 20, ratio=0.5), Row("m=1", "slow <b>", 0.004, 0.004, 20, ratio=2.0)]
    report.record("nf4_linear", rows, LIMITS, HERE, tmp_path)
    small = [Row("x", "peftk", extra=2_000_000, extra_spread=(10**6, 3 * 10**6)), Row("x", "less", extra=1_000_000)]
    report.record("memory", small, LIMITS, HERE, tmp_path)
    found = results.cases(tmp_path)
    assert [(case.op, peer.who, peer.ratio) for case, peer in results.losses(found)] == [
        ("nf4_linear", "fast", 0.5),
        ("memory", "less", 0.5),
    ]
    assert [(goal, reached) for _, goal, reached in results.missed(found)] == [(">= 1x fast", "0.50x")]
    assert results.verdicts(found) == {"met": 1, "missed": 1, "not compared": 0}
    assert (found[0].spread, found[1].spread, found[1].figure) == ("1 to 3", "1 to 3", "2.0 MB")


def test_a_folder_with_little(predicted, tmp_path: Path):
    """No sweep, no plan, a name that is no markup."""
    report.record("nf4_linear", [Row("m=1", "peftk <b>", 0.002, 0.003, 20)], LIMITS, HERE, tmp_path)
    written = page.write(tmp_path / "deep" / "page.html", tmp_path)
    text = written.read_text()
    Reader().feed(text)
    assert "In no recorded case." in text and 'id="sweeps"' not in text


def test_rows_over_m():
    line = report.row_cells("nf4_linear", Row("", "peftk", 0.001, share=0.5)) | HERE.cells()
    rows = [line | {"case": f"m={m}, bf16, 64x32, forward"} for m in (1, 4, 16)]
    few = [line | {"case": f"m={m}, bf16, 64x32, backward"} for m in (1, 4)]
    (lines,) = pictures.over_m([*rows, *few, line | {"case": "4096x4096 to bf16"}]).values()
    assert {(ln["m"], ln["n"], ln["k"], ln["pass"]) for ln in lines} == {
        (m, "64", "32", "nf4_linear, forward") for m in ("1", "4", "16")
    }
    assert plot.series(lines, ("64", "32"), "peftk", "p50_ms", 1.0) == [(1, 1.0), (4, 1.0), (16, 1.0)]


def test_every_picture_is_drawn(predicted, tmp_path: Path):
    lines = sweep.read(next(report.RESULTS.glob("*-sweep.csv")))[:8]
    written = pictures.draw([], [lines, []], tmp_path)
    assert [path.name for path in written][-1] == "memory-over-size.png" and len(written) == 3
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)
    assert [path.name for path in pictures.of_readme(tmp_path)] == ["memory-over-size.png", "qlora-memory.png"]


def test_what_was_measured_lies_on_the_lines():
    row = {"model": "smollm2-135m", "method": "qlora", "base": "nf4", "batch": "1", "length": "256", "checkpointing": "True"}
    row |= {"malloc": memory_plan.GIVEN_BACK, "measured": "3e8"}
    assert pictures._is_on_line(row, ("qlora", "nf4")) and not pictures._is_on_line(row, ("lora", "dense"))
    assert not pictures._is_on_line(row | {"length": "64"}, ("qlora", "nf4"))
    assert not pictures._is_on_line(row | {"malloc": memory_plan.FINETUNE}, ("qlora", "nf4"))


def test_provenance_is_in_every_row(tmp_path: Path):
    path = report.record("nf4_linear", [replace(Row("m=1", "peftk", 0.002, 0.003, 20), p10=0.001)], LIMITS, HERE, tmp_path)
    (row,) = report.read(path)
    assert row["p10_ms"] == "1" and row["machine"] == HERE.machine and row["transformers"]
