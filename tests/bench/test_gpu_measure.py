"""bench/gpu: how times are taken, on a device whose clock moves only when it is told."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from gpu.fake import FakeGpu

import peftk
from bench.gpu import device, limits, measure
from bench.gpu.limits import GpuLimits
from bench.gpu.measure import Forced, GpuCase
from bench.measure import Candidate, Work
from peftk.ops import dispatch

LIMITS = GpuLimits(10e9, 5e9, 8e9, {torch.bfloat16: 100e9, torch.float16: 90e9, torch.float32: 50e9})
WORK = Work(read=6_000_000, write=2_000_000)


def scripted(gpu: FakeGpu, who: str, *seconds: float) -> Candidate:
    """Takes these times, one after the other, again and again."""
    turns = iter(range(10**9))
    return Candidate(who, lambda: gpu.spend(who, seconds[next(turns) % len(seconds)]))


def test_the_order_is_a_b_a_b_from_emptied_l2():
    gpu = FakeGpu()
    case = GpuCase("a case", WORK, [scripted(gpu, "A", 0.001), scripted(gpu, "B", 0.002)])
    times = measure.interleave(gpu, case, case.candidates, rounds=10)
    assert gpu.log == [*["flush", "hold", "event", "A", "event", "wait", "flush", "hold", "event", "B", "event", "wait"]] * (
        measure.WARM_UP + 10
    )
    assert times == [[pytest.approx(0.001)] * 10, [pytest.approx(0.002)] * 10]


def test_calls_on_end_are_neither_flushed_nor_held():
    gpu = FakeGpu()
    case = GpuCase("a case", WORK, [scripted(gpu, "A", 0.001)], calls=3)
    assert measure.seconds(gpu, case, case.candidates[0]) == pytest.approx(0.001)
    assert gpu.log == ["event", "A", "A", "A", "event", "wait"]


def test_a_graph_holds_all_calls():
    gpu = FakeGpu()
    case = GpuCase("a case", WORK, [scripted(gpu, "peftk", 0.001)], calls=3, graph=True)
    (row,) = measure.measure_case(case, gpu, LIMITS, rounds=10).rows
    first = gpu.log.index("replay")
    assert gpu.log[:first] == ["capture", *["peftk"] * 3] and gpu.log.count("capture") == 1
    timed = gpu.log.index("event")
    assert gpu.log[timed : timed + 7] == ["event", "replay", *["peftk"] * 3, "event", "wait"]
    assert row.p50 == pytest.approx(0.001)


def test_who_cannot_be_captured_says_why():
    class NoCapture(FakeGpu):
        def capture(self, run):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    gpu = NoCapture()
    case = GpuCase("a case", WORK, [scripted(gpu, "peftk", 0.001)], calls=3, graph=True)
    (row,) = measure.measure_case(case, gpu, LIMITS).rows
    assert row.p50 is None and row.note == "can't be captured: operation not permitted when stream is capturing"


def test_medians_and_p90():
    gpu = FakeGpu()
    case = GpuCase("a case", WORK, [scripted(gpu, "peftk", *[0.001] * 6, *[0.004] * 4)])
    (row,) = measure.measure_case(case, gpu, LIMITS, rounds=100).rows
    assert (row.p50, row.p90) == (pytest.approx(0.001), pytest.approx(0.004)) and row.rounds >= 100
    assert row.gb_s == pytest.approx(8.0) and row.share == pytest.approx(1.0)  # 6 MB at 10 GB/s, 2 MB at 5 GB/s: 1 ms


def test_parts_share_a_time():
    gpu = FakeGpu()
    case = GpuCase("a case", WORK, [scripted(gpu, "peftk", 0.004)], parts=4)
    assert measure.measure_case(case, gpu, LIMITS, rounds=10).rows[0].p50 == pytest.approx(0.001)


# ---- how steady -------------------------------------------------------------------------------------------------------------


def test_spread_is_that_of_the_median():
    """With 100 values the interval runs from the 40th to the 61st: ranks 100/2 -+ 9.8, one further out."""
    assert measure.spread([float(i) for i in range(1, 101)]) == pytest.approx((61 - 40) / 50.5)
    assert measure.spread([1.0] * 4) == math.inf and measure.spread([1.0] * 9) == 0.0


def test_the_interval_holds_the_median_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(500):
        values = sorted((1 + torch.randn(60, generator=generator)).tolist())
        half = measure.spread([v + 100 for v in values]) * (values[29] + values[30] + 200) / 2
        low = next(i for i in range(30) if values[59 - i] - values[i] == pytest.approx(half))
        held += values[low] <= 1 <= values[59 - low]
    assert held / 500 >= 0.94


def test_rounds_go_on_until_medians_are_steady():
    gpu = FakeGpu()
    unsteady = [0.001 * (1 + 0.001 * ((37 * i) % 100)) for i in range(100)]  # 10 % wide
    case = GpuCase("a case", WORK, [scripted(gpu, "peftk", *unsteady), scripted(gpu, "peer", 0.001)])
    ours, peer = (row.rounds for row in measure.measure_case(case, gpu, LIMITS, rounds=10).rows)
    assert ours == peer and 10 < ours < measure.MOST_ROUNDS


def test_what_stays_unsteady_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "MOST_ROUNDS", 20)
    gpu = FakeGpu(clock="900-1400")
    case = GpuCase("a case", WORK, [scripted(gpu, "peftk", 0.001, 0.002), Candidate("peer", note="not installed")])
    done = measure.measure_case(case, gpu, LIMITS, rounds=10)
    ours, peer = done.rows
    assert ours.rounds == 20 and done.spreads["peftk"] >= measure.SPREAD
    assert "median known to 66.7 % after 20 rounds; SM clock moved, 900-1400 MHz: lock it with nvidia-smi -lgc" == ours.note
    assert peer.note == "not installed" and done.sm_clock_mhz == "900-1400"


def test_a_spent_budget_ends_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "BUDGET", 5.0)
    gpu = FakeGpu()
    case = GpuCase("a case", WORK, [scripted(gpu, "peftk", 1.0)])
    assert measure.measure_case(case, gpu, LIMITS, rounds=50).rows[0].rounds == 6


# ---- ours and theirs --------------------------------------------------------------------------------------------------------


def test_ours_are_forced_while_they_run_and_nobody_else():
    gpu, seen = FakeGpu(), []

    def noting(who: str):
        return lambda: (seen.append((who, dispatch._forced.get())), gpu.spend(who, 0.001))

    mine = Forced("peftk reference", noting("ours"), implementation="reference")
    case = GpuCase("a case", WORK, [mine, Candidate("peer", noting("peer"))], ours=1)
    measure.measure_case(case, gpu, LIMITS, rounds=8)
    assert set(seen) == {("ours", "reference"), ("peer", None)}
    graph = GpuCase("a case", WORK, case.candidates, ours=1, calls=2, graph=True)
    seen.clear()
    measure.measure_case(graph, gpu, LIMITS, rounds=8)
    assert set(seen) == {("ours", "reference"), ("peer", None)}


def test_peers_are_held_against_the_first_of_ours_that_runs():
    gpu = FakeGpu()
    absent = Forced("peftk cuda", note="this build found no nvcc")
    case = GpuCase("a case", WORK, [absent, scripted(gpu, "peftk triton", 0.001), scripted(gpu, "peer", 0.003)], ours=2)
    cuda, triton, peer = measure.measure_case(case, gpu, LIMITS, rounds=10).rows
    assert cuda.p50 is None and cuda.note == "this build found no nvcc"
    assert triton.ratio is None and peer.ratio == pytest.approx(3.0)
    none_of_ours = GpuCase("a case", WORK, [absent, scripted(gpu, "peer", 0.003)], ours=1)
    _, peer = measure.measure_case(none_of_ours, gpu, LIMITS, rounds=10).rows
    assert peer.p50 == pytest.approx(0.003) and peer.ratio is None


def test_a_failing_candidate_is_named():
    with pytest.raises(RuntimeError, match="a case: peftk failed: .*by zero"):
        measure.measure_case(GpuCase("a case", WORK, [Candidate("peftk", lambda: 1 // 0)]), FakeGpu(), LIMITS)


# ---- limits -----------------------------------------------------------------------------------------------------------------


def test_limits_come_from_the_devices_clock():
    gpu = FakeGpu(tick=0.001)  # every timed call takes 1 ms
    sides = {torch.bfloat16: 32, torch.float16: 32, torch.float32: 16}
    found = limits.measure_limits(gpu, size=2**16, sides=sides, rounds=3, launches=10)
    assert (found.read, found.write, found.copy) == pytest.approx((2**16 * 1e3, 2**16 * 1e3, 2**17 * 1e3))
    assert found.matmul == pytest.approx({dtype: 2 * side**3 * 1e3 for dtype, side in sides.items()})
    assert (found.launch, found.launch_in_graph) == pytest.approx((1e-4, 1e-4))
    assert found.rate(torch.float16) == found.matmul[torch.float16] != found.rate(torch.float32)
    assert "a launch 100.0 us, in a CUDA graph 100.0 us" in str(found) and "float16" in str(found)
    assert gpu.log.count("capture") == 1


def test_arrays_are_larger_than_l2():
    gpu = FakeGpu(tick=0.001, l2=2**16)
    found = limits.measure_limits(gpu, size=4, sides=dict.fromkeys(limits.SIDES, 8), rounds=1, launches=1)
    assert found.read == pytest.approx(8 * 2**16 * 1e3)


def test_limits_use_no_tf32():
    seen = []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with limits.fp32_as_it_is():
            seen.append(torch.get_float32_matmul_precision())
        seen.append(torch.get_float32_matmul_precision())
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest", "high"]


# ---- the device -------------------------------------------------------------------------------------------------------------


def smi(folder: Path, body: str) -> device.NvidiaSmi:
    """A program in nvidia-smi's place."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nimport sys, time\n{body}\n")
    program.chmod(0o755)
    return device.NvidiaSmi("GPU-1", str(program))


def test_nvidia_smi_is_asked_for_one_gpu(tmp_path: Path):
    assert smi(tmp_path, "print(' '.join(sys.argv[1:]))").ask("clocks.sm") == (
        "-i GPU-1 --query-gpu=clocks.sm --format=csv,noheader,nounits"
    )


def test_what_nvidia_smi_does_not_tell_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert smi(tmp_path, "print('[N/A]')").ask("power.limit") == device.UNKNOWN
    assert smi(tmp_path, "print('No devices were found'); sys.exit(6)").ask("clocks.sm") == device.UNKNOWN
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert device.NvidiaSmi("GPU-1").ask("clocks.sm") == device.UNKNOWN


def test_clocks_are_read_while_work_runs(tmp_path: Path):
    runs = []
    assert smi(tmp_path, "time.sleep(0.2); print(1410)").ask_while("clocks.sm", lambda: runs.append(1)) == "1410"
    assert len(runs) > 1


def test_a_clock_that_moved_is_a_span():
    assert device.span(["1410", "1410"]) == "1410" and device.span(["1410", "unknown", "990", "1200"]) == "990-1410"
    assert device.span(["unknown"]) == device.span([]) == "unknown"


def test_the_fake_has_all_that_a_device_has():
    wanted = {*device.Device.__annotations__, *(name for name in vars(device.Device) if not name.startswith("_"))}
    assert wanted <= set(dir(FakeGpu())) and wanted >= {"event", "flush", "hold", "place", "l2"}


@pytest.mark.gpu
def test_a_real_device():
    """The clock runs forward, a hold takes time, a graph replays, an emptied L2 is no error."""
    if why := device.why_no_gpu():
        pytest.skip(why)
    gpu = device.Gpu()
    start, end = gpu.event(), gpu.event()
    gpu.flush()
    start.record()
    gpu.hold()
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) > 0.1
    x = torch.zeros(8, device=gpu.place)
    replay = gpu.capture(lambda: x.add_(1))
    x.zero_()
    replay(), replay()
    gpu.synchronise()
    assert x.tolist() == [2.0] * 8
    assert gpu.name and gpu.isa.startswith("sm_") and gpu.l2 > 0 and set(device.FACTS) < set(gpu.facts())
    assert peftk.info().devices or peftk.info().why_not_cuda
