"""bench/gpu: tests before figures, every op's cases, results and picture; the whole flow on a device that isn't one."""

from __future__ import annotations

import csv
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu.fake import FakeGpu

from bench import __main__ as front
from bench import report as tables
from bench.gpu import cases, measure, report, roofline, run
from bench.gpu.device import NoGpu, why_no_gpu
from bench.gpu.limits import GpuLimits
from bench.gpu.measure import Measured
from bench.measure import Row, error_of
from peftk.native import why_not_native
from peftk.ops import gpu

pytestmark = pytest.mark.skipif(bool(why_not_native()), reason=why_not_native() or "native")
ROOT = Path(__file__).resolve().parents[2]
SMALL = ((128, 64), (96, 128))
LIMITS = GpuLimits(10e9, 5e9, 8e9, {torch.bfloat16: 100e9, torch.float16: 90e9, torch.float32: 50e9}, launch=5e-6)
CODES = ("blockwise8_dequantize", "blockwise8_quantize", "nf4_dequantize", "nf4_quantize")


class Closed:
    def why_not(self) -> str:
        return "the door is closed"


@pytest.fixture(autouse=True)
def no_cuda():
    """So that the fake's second implementation says why not, also where a GPU is."""
    with gpu.through("cuda", Closed()):
        yield


def no_gpu():
    raise NoGpu("torch sees no device")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    """Every op's cases, of small matrices."""
    monkeypatch.setattr(cases, "FORWARD_ROWS", {torch.bfloat16: (1, 16), torch.float16: (4,)})
    monkeypatch.setattr(cases, "TRAINING_ROWS", (16,))
    monkeypatch.setattr(cases.adamw, "LORA", cases.adamw.LORA[:4])
    monkeypatch.setattr(measure, "WARM_UP", 1)
    monkeypatch.setattr(run, "CASES", {op: functools.partial(make, shapes=SMALL[:1]) for op, make in cases.CASES.items()})


def main(*argv: str, gpu: FakeGpu | None = None, results: Path | None = None) -> None:
    device = gpu or FakeGpu(tick=0.001)
    run.main(list(argv), lambda: device, lambda device: LIMITS, results)


# ---- cases ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", list(cases.CASES))
def test_cases_are_sound(op: str):
    """Ours first, by each implementation; a result that is right; peers and yardstick beside it; names of their own."""
    names = []
    for case in cases.CASES[op](FakeGpu(), shapes=SMALL):
        names.append(case.name)
        assert [c.who for c in case.candidates[: case.ours]] == ["peftk cpu", "peftk cuda"]
        ours, absent, *peers = case.candidates
        assert 0 <= error_of(case, ours) < 0.1 and absent.run is None and absent.note
        assert "bitsandbytes" in peers[0].who and "dense" in peers[-1].who
        for peer in peers:
            if peer.run and peer.error:
                assert 0 <= error_of(case, peer) < 0.1
        assert case.work.read > 0 and case.work.write > 0 and case.graph <= (case.calls > 1)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("op", CODES)
def test_codes_are_timed_from_memory_on_end_and_in_a_graph(op: str):
    protocols = [(case.from_memory, case.calls > 1, case.graph) for case in cases.CASES[op](FakeGpu(), shapes=SMALL)]
    assert set(protocols) == {(True, False, False), (False, True, False), (False, True, True)}


def test_the_sizes_asked_for():
    assert cases.SHAPES == ((4096, 4096), (8192, 8192), (11008, 4096))
    assert {2048, 512} <= set(cases.TRAINING_ROWS) and 1 in cases.FORWARD_ROWS[torch.bfloat16]


def test_an_op_that_lacks_an_implementation_says_so(monkeypatch: pytest.MonkeyPatch):
    assert cases.why_not(["nf4_dequantize"], "cpu") == "" and cases.why_not(["nf4_dequantize"], "reference") == ""
    assert re.match(r"nf4_linear_int8 has no such implementation \(it has cpu", cases.why_not(["nf4_linear_int8"], "triton"))
    table = [type("Implementation", (), {"name": name}) for name in ("cpu", "cuda")]
    monkeypatch.setattr(cases.importlib, "import_module", lambda name: type("Module", (), {"TABLE": table}))
    assert cases.why_not(["any"], "cuda") == "the door is closed"


# ---- the whole flow ---------------------------------------------------------------------------------------------------------


def test_everything_is_measured_recorded_and_drawn(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(run, "run_tests", lambda ops: print("tested:", *ops))
    main("--record", "--plot", str(tmp_path / "plot"), "--repeat", "8", results=tmp_path)
    printed = capsys.readouterr().out
    assert printed.startswith("tested: adamw_step blockwise8_dequantize blockwise8_quantize nf4_dequantize nf4_linear")
    with (tmp_path / "fake-gpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == report.COLUMNS == (*tables.COLUMNS, *report.FACTS, *report.OWN)
    assert list(dict.fromkeys(row["op"] for row in rows)) == list(cases.CASES)
    for row in rows:
        assert (row["machine"], row["isa"], row["driver"], row["power_cap_w"]) == ("fake-gpu", "sm_00", "0.0", "1")
        assert (row["sm_clock_mhz"], row["limit_fp16_gflop_s"], row["limit_launch_us"]) == ("1000", "90", "5")
        assert row["commit"] and row["torch"] == torch.__version__ and row["triton"]
    ours, absent = ([row for row in rows if row["who"] == who] for who in ("peftk cpu", "peftk cuda"))
    assert len(ours) == len(absent) == printed.count("peftk cuda") > 2 * len(cases.CASES)
    for row in ours:
        assert row["p50_ms"] == row["p90_ms"] == ("0.05" if " calls " in row["case"] else "1")  # 1 ms between events
        assert row["rounds"] == "8" and float(row["error"]) < 0.1 and float(row["spread"]) < 1e-6
    assert all(row["note"] and row["p50_ms"] == row["spread"] == row["error"] == "" for row in absent)
    assert "p50 us" in printed and re.search(r"^  peftk cpu +1000\.00 +1000\.00 ", printed, re.MULTILINE)
    picture = tmp_path / "plot" / "roofline-fake-gpu.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n") and f"drawn: {picture}" in printed
    assert [path.name for path in (tmp_path / "plot").iterdir()] == [picture.name]


def test_ops_are_chosen_by_name(small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(run, "run_tests", lambda ops: None)
    main("nf4_dequantize", "--repeat", "8", results=tmp_path)
    assert "== nf4_dequantize" in (printed := capsys.readouterr().out) and "nf4_quantize" not in printed
    assert list(tmp_path.iterdir()) == []  # nothing recorded that nobody asked for


def test_tf32_is_off_while_everyone_is_timed(small, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(run, "measure_case", lambda *_: seen.append(torch.get_float32_matmul_precision()) or Measured([], {}, ""))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        main("nf4_linear", "--skip-tests")
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}


# ---- no GPU, red tests, bad arguments ---------------------------------------------------------------------------------------


def test_no_gpu_is_one_line():
    with pytest.raises(SystemExit, match="^python -m bench --gpu: no GPU: torch sees no device$"):
        run.main(["nf4_dequantize"], no_gpu)


@pytest.mark.skipif(not why_no_gpu(), reason="a GPU is here")
def test_no_gpu_by_the_front_door():
    done = subprocess.run([sys.executable, "-m", "bench", "--gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"python -m bench --gpu: no GPU: torch .*\n", done.stderr), done.stderr


def test_the_front_door_hands_on(monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(run, "main", seen.append)
    front.main(["nf4_quantize", "--gpu", "--record"])
    assert seen == [["nf4_quantize", "--record"]]


def pretend(monkeypatch: pytest.MonkeyPatch, code_of) -> list[list[str]]:
    """pytest that isn't run: its arguments, and the exit codes that it would have had."""
    asked = []

    def run_(command, **_):
        asked.append(command[3:])
        return subprocess.CompletedProcess(command, code_of(command))

    monkeypatch.setattr(run.subprocess, "run", run_)
    return asked


def test_red_tests_give_no_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    asked = pretend(monkeypatch, lambda command: int("[nf4_quantize-" in command))
    with pytest.raises(SystemExit, match=r"tests/gpu -k \[nf4_quantize- is not green: no figures for nf4_quantize"):
        main("nf4_dequantize", "nf4_quantize", "nf4_linear")
    assert asked == [
        ["-q", "-m", "gpu", "tests/ops/test_nf4_dequantize.py"],
        ["-q", "-m", "gpu", "tests/gpu", "-k", "[nf4_dequantize-"],
        ["-q", "-m", "gpu", "tests/ops/test_nf4_quantize.py"],
        ["-q", "-m", "gpu", "tests/gpu", "-k", "[nf4_quantize-"],
    ]
    assert "p50" not in capsys.readouterr().out


@pytest.mark.parametrize(("code", "stops"), [(0, False), (run.NO_TESTS, False), (2, True), (3, True), (4, True)])
def test_an_op_without_gpu_tests_is_not_red(monkeypatch: pytest.MonkeyPatch, code: int, stops: bool):
    pretend(monkeypatch, lambda command: code)
    if stops:
        with pytest.raises(SystemExit, match="is not green"):
            run.run_tests(["nf4_linear"])
    else:
        run.run_tests(["nf4_linear"])


def test_the_tests_that_are_run_exist():
    _, command = run.test_commands("nf4_quantize")
    collect = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", *command]
    done = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True)
    found = re.findall(r"^tests/gpu/\S+\[(\w+)-\S+\]$", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and len(found) > 10 and set(found) == {"nf4_quantize"}, done.stdout


@pytest.mark.skipif(not why_no_gpu(), reason="a GPU is here")
def test_without_a_gpu_they_are_skipped_with_reasons_and_without_the_mark_deselected():
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-rs", "tests/gpu/test_device.py", "-k", "stream or bit_for_bit"]
    marked = subprocess.run([*pytest_, "-m", "gpu"], cwd=ROOT, capture_output=True, text=True)
    assert marked.returncode == 0 and re.search(r"^24 skipped, \d+ deselected", marked.stdout, re.MULTILINE), marked.stdout
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+: (.+)$", marked.stdout, re.MULTILINE)
    assert reasons and all(re.search("has no such implementation|nvcc|no device|sees no GPU|driver", why) for why in reasons)
    unmarked = subprocess.run(pytest_, cwd=ROOT, capture_output=True, text=True)
    assert unmarked.returncode == 0 and re.search(r"^4 passed, \d+ deselected", unmarked.stdout, re.MULTILINE), unmarked.stdout


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["gemm"], "op: expected some of adamw_step, .*, got gemm"),
        (["--repeat", "0"], "--repeat: expected a positive number, got 0"),
        (["--record", "--skip-tests"], "--record: expected tests"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        run.arguments(argv)
    assert re.search(message, capsys.readouterr().err)


# ---- results and picture ----------------------------------------------------------------------------------------------------

ROWS = [
    Row("a case", "peftk cuda", 0.002, 0.003, 50, 4.0, None, 0.5, 1.6e-3),
    Row("a case", "peftk triton", note="triton is not installed"),
]
PRODUCT = Row("m=8", "torch dense", 0.001, 0.001, 50, 10.0, 80.0, 0.5)


@pytest.fixture
def provenance() -> report.Provenance:
    return report.Provenance.of(FakeGpu())


def test_recording_appends(tmp_path: Path, provenance: report.Provenance):
    measured = [Measured(ROWS, {"peftk cuda": 0.0123}, "1000-1200")]
    path = report.record("nf4_dequantize", measured, LIMITS, provenance, tmp_path)
    before = path.read_bytes()
    report.record("nf4_linear", [Measured([PRODUCT], {}, "1000")], LIMITS, provenance, tmp_path)
    assert path.name == "fake-gpu.csv" and path.read_bytes().startswith(before)
    ours, absent, product = tables.read(path, (report.COLUMNS,))
    assert (ours["p50_ms"], ours["spread"], ours["sm_clock_mhz"]) == ("2", "0.0123", "1000-1200")
    assert (absent["p50_ms"], absent["spread"], absent["note"]) == ("", "", "triton is not installed")
    assert (product["op"], product["gflop_s"]) == ("nf4_linear", "80")


def test_a_file_with_other_columns_is_left_alone(tmp_path: Path, provenance: report.Provenance):
    path = tmp_path / "fake-gpu.csv"
    path.write_text("date,speed\n2020,9\n")
    with pytest.raises(ValueError, match="expected the columns date, commit.*got date, speed"):
        report.record("nf4_linear", [Measured(ROWS, {}, "1")], LIMITS, provenance, tmp_path)
    assert path.read_text() == "date,speed\n2020,9\n"


def test_provenance_names_what_figures_depend_on(provenance: report.Provenance):
    assert re.match(r"fake-gpu, \d+ threads, sm_00; peftk .*driver 0.0, power_cap_w 1, max_sm_clock_mhz 2$", str(provenance))
    assert set(provenance.cells()) == {*tables.WHERE, *report.FACTS}


def lines_of(provenance: report.Provenance, *rows: Row) -> list[dict[str, str]]:
    return report.lines("an_op", [Measured(list(rows), {}, "1000")], LIMITS, provenance)


def test_points_are_bytes_or_intensity(provenance: report.Provenance):
    lines = lines_of(provenance, ROWS[0], PRODUCT)
    assert roofline.points(lines, multiplies=False) == [(pytest.approx(8.0), 4.0, lines[0])]  # 4 GB/s for 2 ms: 8 MB
    assert roofline.points(lines, multiplies=True) == [(pytest.approx(8.0), 80.0, lines[1])]


@pytest.mark.parametrize("rows", [ROWS, [PRODUCT], [*ROWS, PRODUCT]], ids=["memory", "products", "both"])
def test_a_picture_has_the_panels_that_have_points(rows: list[Row], provenance: report.Provenance, tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = roofline.draw(lines_of(provenance, *rows), tmp_path / "new")
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_limits_are_drawn(provenance: report.Provenance):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    (line,) = lines_of(provenance, PRODUCT)
    roofline.bandwidth_panel(memory := figure.add_subplot(1, 2, 1), line, [])
    assert [drawn.get_ydata()[0] for drawn in memory.lines] == [10.0, 5.0, 8.0]
    roofline.roofline_panel(products := figure.add_subplot(1, 2, 2), line, [1.0])
    assert [max(drawn.get_ydata()) for drawn in products.lines] == [100.0, 90.0, 50.0]
    xs, ys = products.lines[0].get_data()
    assert ys[0] == pytest.approx(8.0 * xs[0]) and xs[0] < 1.0 and xs[1] == pytest.approx(100 / 8)


def test_nothing_to_draw(provenance: report.Provenance, tmp_path: Path):
    with pytest.raises(ValueError, match="expected rows with times, got none"):
        roofline.draw(lines_of(provenance, ROWS[1]), tmp_path)
