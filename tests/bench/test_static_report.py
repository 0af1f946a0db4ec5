"""Calculated limits, bitsandbytes' kernels, recorded launches, the sample, and what the command prints."""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from static_samples import SOURCE, needs_compilers

from bench import __main__ as main
from bench.static import gates, launches, matrix, nvcc, peers, predict, report
from bench.static.matrix import Job

needs_bitsandbytes = pytest.mark.skipif(bool(peers.why_not()), reason=peers.why_not() or "-")
GPUS = {gpu.name: gpu for gpu in predict.GPUS}


# ---- calculated limits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "instructions"), [("A100", 4.93), ("H100", 4.76), ("H200", 3.32), ("B200", 2.26), ("RTX 4090", 21.1), ("L4", 26.0)]
)
def test_where_issue_slots_begin_to_bind(name: str, instructions: float):
    """128 slots over the weights that memory brings a clock and multiprocessor, 0.516 bytes each."""
    below, above = (predict.limit(GPUS[name], 1 << 20, 0.516, instructions * f) for f in (0.99, 1.01))
    assert (below.binds, above.binds) == ("bytes", "issue")


def test_limits_by_hand():
    """A100: 2039 GB/s, 312 TFLOP/s; 2^24 elements of 2.5 bytes, 512 flop."""
    one = predict.limit(GPUS["A100"], 1 << 24, 2.5, 1, 512)
    assert one.by_bytes == pytest.approx((1 << 24) * 2.5 / 2039e9 * 1e6) and one.by_bytes == pytest.approx(20.57, abs=0.01)
    assert one.by_tensor == pytest.approx((1 << 24) * 512 / 312e12 * 1e6) and one.binds == "tensor"
    assert one.by_issue == pytest.approx((1 << 24) / (108 * 128 * 1.41e9) * 1e6) and one.least == one.by_tensor


def test_who_runs_what():
    served = {gpu.name for gpu in predict.GPUS if predict.serves("sm_80", gpu)}
    assert served == {"A100", "A10", "RTX 3090", "L4", "RTX 4090"}
    assert all(any(predict.serves(target, gpu) for target in nvcc.TARGETS) for gpu in predict.GPUS)
    assert not any(predict.serves("gfx942", gpu) for gpu in predict.GPUS)


# ---- bitsandbytes ------------------------------------------------------------------------------------------------------------


@needs_bitsandbytes
def test_its_kernels_for_ampere():
    """Its fused products as its sources have them, compiled and counted by hand: 7.9, 16.9 and 10.8 instructions a weight."""
    rows = {row.kernel: row for row in peers.rows(["nf4_linear", "nf4_dequantize"], "sm_80")}
    assert rows["gemm_4bit_simt<__nv_bfloat16, 1>"].per_element == pytest.approx(7.9, abs=0.5)
    assert rows["gemm_4bit_simt<__nv_bfloat16, 4>"].per_element == pytest.approx(16.9, abs=0.5)
    product = rows["gemm_4bit_sm80_m16n8k16<__nv_bfloat16, 128, 128, 64>"]
    assert product.per_element == pytest.approx(10.8, abs=0.2) and product.mma == "64 HMMA" and product.threads == 256
    assert rows["kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>"].wide == 0


@needs_bitsandbytes
def test_every_row_of_theirs_is_found():
    """In the code for every target that both have."""
    table = gates.read(gates.PEERS)
    for target in ("sm_80", "sm_120a"):
        rows = peers.rows([gate.op for gate in table], target)
        assert gates.unused(table, [(row.op, row.backend, row.kernel, row.target) for row in rows]) == []
    assert {"sm_75", "sm_80", "sm_90", "sm_100", "sm_120"} <= set(peers.targets())


def test_no_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(peers.tools, "why_not", lambda: "")
    assert peers.library() is None and peers.why_not() == "bitsandbytes is not installed, or its wheel holds no CUDA library"


# ---- launches and the matrix -------------------------------------------------------------------------------------------------


@needs_compilers
@pytest.mark.parametrize("op", launches.ops_with_triton())
def test_recorded_launches(op: str):
    """Every op with Triton kernels has calls, and every dtype of theirs is compiled."""
    names = [launch.name for launch in launches.recorded(op)]
    assert len(set(names)) == len(names)
    assert {dtype for name in names for dtype in re.findall(r"\b(?:fp32|bf16|fp16)\b", name)} == {"fp32", "bf16", "fp16"}


def test_an_op_without_calls():
    with pytest.raises(RuntimeError, match="no calls of lora_linear"):
        launches.recorded("lora_linear")


def test_a_call_that_launches_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(launches.CALLS, "nothing", lambda: iter([lambda: torch.zeros(1)]))
    with pytest.raises(RuntimeError, match="nothing: a call launched no Triton kernel"):
        launches.recorded("nothing")


def test_the_sample_covers():
    targets = ("sm_75", "sm_80", "sm_90a", "sm_100a", "sm_120a")
    every = [Job(op, "cuda", target) for op in "abcde" for target in targets]
    every += [Job(op, "triton", target, launch) for op in "ab" for launch in range(3) for target in ("sm_80", "sm_90", "gfx942")]
    sample = matrix.covering(every)
    assert {(j.op, j.backend, j.number) for j in every} == {(j.op, j.backend, j.number) for j in sample}
    assert {(j.backend, j.target) for j in every} == {(j.backend, j.target) for j in sample}
    assert len(sample) == 5 + 6 and len(set(sample)) == len(sample)


# ---- the command -------------------------------------------------------------------------------------------------------------


def test_static_goes_to_the_report(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(report, "main", lambda ops, record: asked.append((ops, record)))
    main.main(["--static", "nf4_dequantize", "--record"])
    assert asked == [(["nf4_dequantize"], True)]


@needs_compilers
def test_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path):
    """Tables of a source with a kernel that meets its gate and others that don't; limits marked as calculated; the record."""
    gate = gates.Gate("nf4_dequantize", "cuda", "copy", "*", "path", elements=4, bytes=8, registers=16)
    rows = matrix.judged(nvcc.compiled(SOURCE, "sm_80"), "nf4_dequantize", "cuda", "sm_80", [gate])
    monkeypatch.setattr(report, "everything", lambda ops: rows)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "static.csv")
    with pytest.raises(SystemExit, match="gate missed: unpack for sm_80: missed: no row of gates.csv matches it"):
        report.main(["nf4_dequantize"], record=True)
    shown = capsys.readouterr().out
    assert re.search(r"nf4_dequantize +cuda +copy +sm_80 +1\d +0 +0 +11 +2.75 +100% +8 +100% +met\n", shown)
    assert "what binds: calculated, not measured" in shown and re.search(r"copy +65.8 bytes", shown)
    (first, *_) = csv.DictReader((tmp_path / "static.csv").open())
    assert first["op"] == "nf4_dequantize" and first["nvcc"] == nvcc.release() and len(first["commit"]) > 6


def test_a_record_of_one_op_keeps_the_others(tmp_path: Path):
    """Those of the same op are replaced, not added to."""
    path = tmp_path / "static.csv"
    gate = gates.Gate("nf4_dequantize", "cuda", "copy", "*", "path", elements=4)
    (first,) = [
        row for row in matrix.judged(nvcc.compiled(SOURCE, "sm_80"), "a", "cuda", "sm_80", [gate]) if row.kernel == "copy"
    ]
    assert report.kept(path, ["a"]) == []
    for op in ("a", "b", "a"):
        report.write([dataclasses.replace(first, op=op)], path, report.kept(path, [op]))
    assert [line["op"] for line in csv.DictReader(path.open())] == ["b", "a"]


def test_an_unknown_op(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(matrix, "why_not", lambda: "")
    with pytest.raises(SystemExit, match="--static: expected ops with GPU kernels, some of .*nf4_linear.*, got gemm"):
        report.main(["gemm"], record=False)


def test_no_compilers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(matrix, "why_not", lambda: "no nvcc")
    with pytest.raises(SystemExit, match="--static: no nvcc"):
        report.main([], record=False)
