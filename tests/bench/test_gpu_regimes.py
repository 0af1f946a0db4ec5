"""bench/gpu/regimes.py: the calculation behind peftk/ops/regimes.csv, the measurement that replaces it, and the file."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
from gpu.fake import FakeGpu

from bench import __main__ as front
from bench.gpu import regimes as calculation
from bench.static import predict
from peftk.ops import gpu, regimes
from peftk.ops.gpu import GpuModel

GPUS = {one.name: one for one in predict.GPUS}
DRIVERS_NAMES = {
    "Tesla T4": "T4", "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA A10": "A10", "NVIDIA GeForce RTX 3090": "RTX 3090",
    "NVIDIA L4": "L4",
    "NVIDIA GeForce RTX 4090": "RTX 4090", "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200", "NVIDIA B200": "B200",
    "NVIDIA GeForce RTX 5090": "RTX 5090",
}  # fmt: skip


def test_the_file_is_what_is_calculated():
    """python -m bench --regimes --record, after python -m bench --static --record."""
    rows = regimes.table()
    measured = {(r.backend, r.gpu, r.product, r.kind) for r in rows if r.source == "measured"}
    wanted = [r for r in calculation.calculated_table() if (r.backend, r.gpu, r.product, r.kind) not in measured]
    assert [r for r in rows if r.source == "calculated"] == wanted
    text = calculation.README.read_text()
    assert calculation.page() in text


@pytest.mark.parametrize("driver", DRIVERS_NAMES)
def test_a_gpu_gets_its_own_rows(driver):
    one = GPUS[DRIVERS_NAMES[driver]]
    model = GpuModel(driver, divmod(one.capability, 10), one.sms)
    row = regimes.choose("cuda", model, "forward", "plain", 1)
    assert row.gpu == calculation.GLOBS[one.name]


def test_large_m_goes_by_chunks_and_few_rows_never_do():
    for name, one in GPUS.items():
        rows = list(calculation.calculated_rows(one, name))
        forward = [r for r in rows if (r.backend, r.product, r.kind) == ("cuda", "forward", "tensor")]
        assert not forward or (forward[0].regime == "few" and forward[-1].regime == "chunks"), name


def test_a_regime_takes_as_long_as_its_scarcest_resource(monkeypatch):
    monkeypatch.setattr(calculation, "figures", lambda *_: calculation.Figures(4.0, 2))
    few = calculation.Candidate("few", 8, "tensor")
    time = lambda name: calculation.calculated_time(GPUS[name], "cuda", "forward", few, 1)  # noqa: E731
    assert time("L4").binds == "bytes" and time("B200").binds == "issue slots"
    bytes_us = (0.516 * 4096**2 + 2 * 4096 * 2) / 300 / 1e3
    assert time("L4").us == pytest.approx(bytes_us / calculation.KERNEL_SHARE + calculation.LAUNCH_US)


def row(**changes):
    return replace(regimes.Row("cuda", "*A100*", "forward", "tensor", 0, "few", 8, 4, 0, "calculated"), **changes)


def test_what_was_measured_stays_until_it_is_measured_again():
    before = [row(source="measured", least_m=5), row(gpu="*L4")]
    assert calculation.merged([row(), row(gpu="*L4", blocks=9)], before) == [row(gpu="*L4", blocks=9), before[0]]
    assert calculation.merged([row(source="measured")], before) == [row(source="measured"), before[1]]


def test_measured_on_a_device(monkeypatch, tmp_path):
    """The whole flow with the emulator for a GPU: every kernel that may win is timed once, and the file is rewritten."""
    doors = importlib.import_module("emulation.doors")
    if why := doors.why_not("cuda-ptx"):
        pytest.skip(why)
    monkeypatch.setattr(calculation, "ROWS", (8, 32))
    monkeypatch.setattr(calculation, "SIZE", 64)
    monkeypatch.setattr(calculation, "LEAST_ROUNDS", 1)
    monkeypatch.setattr("bench.gpu.measure.WARM_UP", 0)
    monkeypatch.setattr("bench.gpu.measure.BUDGET", 0.0)
    device, path = FakeGpu(tick=0.001), tmp_path / "regimes.csv"
    with gpu.through("cuda", doors.door("cuda-ptx")):
        rows = list(calculation.measured_rows(device, device.name, ("cuda",), 64))
        monkeypatch.setattr(calculation, "measured_rows", lambda *_: rows)
        calculation.main(["--gpu", "--record"], lambda: device, path)
    assert {(r.product, r.kind) for r in rows} == {(p, k) for p in ("forward", "backward") for k in ("tensor", "plain")}
    regimes.table.cache_clear()
    assert list(regimes.table(path)) == rows and all(r.gpu == "fake-gpu" and r.source == "measured" for r in rows)


def test_without_a_gpu(capsys):
    with pytest.raises(SystemExit, match="no GPU: "):
        front.main(["--regimes", "--gpu"])
    front.main(["--regimes"])
    assert "calculated, not measured" in capsys.readouterr().out
