"""bench/report.py: what is printed, what is recorded, what the README gets."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import report
from bench.goals import Verdict
from bench.limits import Limits
from bench.measure import Row

LIMITS = Limits(10e9, 5e9, 8e9, {torch.bfloat16: 100e9, torch.float32: 50e9}, {torch.bfloat16: 125e9})
HEADLINES = {"nf4_linear": "", "nf4_quantize": ""}
VERSIONS = {"peftk": "0.1", "torch": "2.13", "bitsandbytes": "not installed", "peft": "0.21"}
HERE = report.Provenance("2026-01-02", "abc1234", "some-cpu-2cores", 2, "avx2", VERSIONS)
OURS = Row("a case", "peftk", 0.002, 0.003, 20, 4.0, None, 0.5, 1.6e-3, None, (Verdict(">= 2x peer", "1.50x", False),))
SLOWER = Row("a case", "peer", 0.003, 0.004, 20, 3.0, 70.0, 0.4, 1.7e-3, 1.5)
ABSENT = Row("a case", "other", note="not installed")


def test_the_table_keeps_every_row():
    text = report.table([OURS, SLOWER, ABSENT])
    ours, slower, absent = text.splitlines()[2:]
    assert text.splitlines()[0] == "a case"
    assert "2.000" in ours and "50 %" in ours and "1.60e-03" in ours and "goal >= 2x peer: missed (1.50x)" in ours
    assert "1.50x as fast" in slower and "70" in slower
    assert "not installed" in absent and report.NONE in absent


def test_the_table_leaves_out_columns_that_nobody_fills():
    assert "extra MB" not in report.table([OURS, SLOWER]) and "GFLOP/s" in report.table([OURS, SLOWER])
    memory = report.table([Row("a case", "peftk", extra=2_500_000)])
    assert "extra MB" in memory and "2.5" in memory and "p50" not in memory


def test_several_goals_are_all_judged(tmp_path: Path):
    ours = replace(OURS, verdicts=(Verdict(">= 2x peer", "1.50x", False), Verdict("<= 9 us", "8.0 us", True)))
    assert "goal >= 2x peer: missed (1.50x); goal <= 9 us: met (8.0 us)" in report.table([ours])
    rows = report.read(report.record("nf4_linear", [ours], LIMITS, HERE, tmp_path))
    assert (rows[0]["goal"], rows[0]["met"], rows[0]["reached"]) == (">= 2x peer; <= 9 us", "missed; met", "1.50x; 8.0 us")
    assert "| >= 2x peer: missed<br><= 9 us: met |" in report.markdown(rows, HEADLINES)


def test_the_machines_name_is_its_processor():
    cpuinfo = "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\ncpu family\t: 25\n"
    assert report.machine_name(cpuinfo, 2) == "amd-epyc-f25m17-2cores"
    assert report.machine_name("model name : Apple M2 (virtual)\n", 8) == "apple-m2-virtual-8cores"


def test_provenance_of_here():
    here = report.Provenance.here()
    assert here.threads == torch.get_num_threads() and here.versions["torch"] == torch.__version__
    assert set(here.cells()) == set(report.WHERE)


def test_recorded_rows_come_back(tmp_path: Path):
    path = report.record("nf4_linear", [OURS, SLOWER, ABSENT], LIMITS, HERE, tmp_path)
    assert path == tmp_path / "some-cpu-2cores.csv"
    ours, slower, absent = report.read(path)
    assert (ours["op"], ours["case"], ours["who"], ours["p50_ms"], ours["met"]) == (
        "nf4_linear",
        "a case",
        "peftk",
        "2",
        "missed",
    )
    assert (ours["date"], ours["commit"], ours["threads"], ours["isa"]) == ("2026-01-02", "abc1234", "2", "avx2")
    assert (ours["gflop_s"], slower["gflop_s"], slower["ratio"], slower["met"]) == ("", "70", "1.5", "")
    assert (absent["p50_ms"], absent["note"], absent["bitsandbytes"]) == ("", "not installed", "not installed")
    assert (ours["limit_read_gb_s"], ours["limit_bf16_gflop_s"]) == ("10", "100")
    assert (ours["limit_bf16_registers_gflop_s"], ours["limit_fp32_registers_gflop_s"]) == ("125", "")


def test_recording_appends(tmp_path: Path):
    path = report.record("nf4_linear", [OURS], LIMITS, HERE, tmp_path)
    before = path.read_bytes()
    report.record("nf4_linear", [SLOWER], LIMITS, HERE, tmp_path)
    assert path.read_bytes().startswith(before) and len(report.read(path)) == 2


def test_a_file_from_before_the_newest_columns_gets_them(tmp_path: Path):
    path = report.record("nf4_linear", [OURS], LIMITS, HERE, tmp_path)
    (row,) = report.read(path)
    report.write_csv(path, report.FIRST_COLUMNS, [{name: row[name] for name in report.FIRST_COLUMNS}])
    (old,) = report.read(path)
    assert old["p50_ms"] == "2" and old["reached"] == old["extra_mb"] == ""
    report.record("nf4_linear", [SLOWER], LIMITS, HERE, tmp_path)
    assert path.read_text().splitlines()[0] == ",".join(report.COLUMNS)
    assert [r["who"] for r in report.read(path)] == ["peftk", "peer"] and report.read(path)[0] == old


def test_a_file_with_other_columns_is_left_alone(tmp_path: Path):
    path = tmp_path / f"{HERE.machine}.csv"
    path.write_text("date,speed\n2020,9\n")
    with pytest.raises(ValueError, match="expected the columns date, commit.*got date, speed"):
        report.record("nf4_linear", [OURS], LIMITS, HERE, tmp_path)
    assert path.read_text() == "date,speed\n2020,9\n"


def test_the_readme_gets_the_table_between_the_markers(tmp_path: Path):
    path = report.record("nf4_linear", [OURS, SLOWER, ABSENT], LIMITS, HERE, tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n{report.BEGIN}\nold\n{report.END}\ntail\n")
    report.rewrite_readme(path, HEADLINES, readme)
    text = readme.read_text()
    assert (
        text.startswith(f"# Title\n{report.BEGIN}\n| op | on | case |")
        and text.endswith(f"{report.END}\ntail\n")
        and "old" not in text
    )
    line = next(line for line in text.splitlines() if line.startswith("| `nf4_linear`"))
    assert "| a case | 2 ms | 4.0 | – | 50 % | 1.6e-03 | >= 2x peer: missed |" in line
    assert "peer: 3 ms, 1.50x, 1.7e-03<br>other: not installed" in line
    assert "some-cpu-2cores, 2 threads, avx2; peftk 0.1, torch 2.13, bitsandbytes not installed, peft 0.21." in text
    report.rewrite_readme(path, HEADLINES, readme)
    assert readme.read_text() == text


@pytest.mark.parametrize(
    "text", ["no markers\n", f"{report.BEGIN}\n", f"{report.END}\n{report.BEGIN}\n", f"{report.BEGIN}{report.END}" * 2]
)
def test_missing_markers_are_an_error(tmp_path: Path, text: str):
    path = report.record("nf4_linear", [OURS], LIMITS, HERE, tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="README.md: expected one <!-- bench:begin --> and after it one <!-- bench:end -->"):
        report.rewrite_readme(path, HEADLINES, readme)
    assert readme.read_text() == text


def test_the_newest_run_of_a_case_counts(tmp_path: Path):
    report.record("nf4_linear", [OURS, SLOWER], LIMITS, HERE, tmp_path)
    report.record("nf4_quantize", [OURS], LIMITS, HERE, tmp_path)
    later = replace(HERE, date="2026-02-03")
    path = report.record("nf4_linear", [replace(OURS, p50=0.001), ABSENT], LIMITS, later, tmp_path)
    text = report.markdown(report.read(path), HEADLINES)
    assert "| 1 ms |" in text and "peer: 3 ms" not in text and "other: not installed" in text
    assert "2026-01-02" in text and "2026-02-03" in text  # nf4_quantize is still the older run


def test_one_case_a_bench_is_shown(tmp_path: Path):
    others = [replace(OURS, case="m=1, bf16"), replace(OURS, case="m=512, bf16"), replace(OURS, case="m=512, fp32")]
    path = report.record("nf4_linear", others, LIMITS, HERE, tmp_path)
    report.record("nf4_dequantize", [OURS], LIMITS, HERE, tmp_path)
    text = report.markdown(report.read(path), {"nf4_linear": "m=512, bf16", "nf4_quantize": ""})
    assert [line for line in text.splitlines() if line.startswith("| `")] == [
        line for line in text.splitlines() if line.startswith("| `nf4_linear` | avx2 | m=512, bf16 |")
    ]
    assert text.count("| `") == 1


def test_the_readme_shows_the_highest_instruction_set(tmp_path: Path):
    fast = replace(HERE, isa="avx512_bf16")
    report.record("nf4_linear", [replace(OURS, p50=0.001)], LIMITS, fast, tmp_path)
    path = report.record("nf4_linear", [OURS], LIMITS, HERE, tmp_path)  # later, avx2
    text = report.markdown(report.read(path), HEADLINES)
    assert "| 1 ms |" in text and "| 2 ms |" not in text
    assert len(report.newest_runs(report.read(path))) == 2


def test_the_readme_shows_every_machine(tmp_path: Path):
    """Each with its own newest run; what else lies in the folder, sweeps among it, is none."""
    other = replace(HERE, machine="other-cpu-8cores", isa="avx512", date="2026-03-04")
    report.record("nf4_linear", [replace(OURS, p50=0.001), replace(SLOWER, p50=0.009)], LIMITS, other, tmp_path)
    path = report.record("nf4_linear", [OURS, SLOWER], LIMITS, HERE, tmp_path)
    report.write_csv(tmp_path / f"{HERE.machine}-sweep.csv", report.COLUMNS, report.read(path))
    (tmp_path / "static.csv").write_text("gpu,kernel\nsm_80,k\n")
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    report.rewrite_readme(path, HEADLINES, readme)
    text = readme.read_text()
    lines = [line for line in text.splitlines() if line.startswith("| `nf4_linear`")]
    assert (
        [line.split(" | ")[1] for line in lines] == ["avx512", "avx2"] and "peer: 9 ms" in lines[0] and "peer: 3 ms" in lines[1]
    )
    assert "`nf4_linear`: 2026-03-04" in text and "`nf4_linear`: 2026-01-02" in text


def test_memory_stands_where_times_do(tmp_path: Path):
    rows = [Row("a case", "peftk", extra=2_500_000), Row("a case", "peer", extra=20_000_000)]
    path = report.record("memory", rows, LIMITS, HERE, tmp_path)
    assert "| a case | 2.5 MB |" in report.markdown(report.read(path), {"memory": ""})
    assert "peer: 20.0 MB |" in report.markdown(report.read(path), {"memory": ""})
