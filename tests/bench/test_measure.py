"""bench/measure.py: order, clocks, rows; bench/limits.py and bench/peak.py: what they are held against."""

import gc
import shutil
import time

import pytest
import torch

from bench import limits, measure, peak
from bench.goals import Goal
from bench.limits import Limits
from bench.measure import Candidate, Case, Work

LIMITS = Limits(read=10e9, write=5e9, copy=8e9, matmul={torch.bfloat16: 100e9, torch.float32: 50e9})
WORK = Work(read=6_000_000, write=2_000_000, flop=4_000_000)


def case(*candidates: Candidate, goals: Goal | tuple = (), **protocol: int) -> Case:
    return Case("a case", WORK, candidates, goals, **protocol)


def sleeper(who: str, seconds: float) -> Candidate:
    return Candidate(who, lambda: time.sleep(seconds))


def test_the_order_is_a_b_a_b_after_a_warm_up():
    calls = []
    times = measure.interleave([lambda: calls.append("A"), lambda: calls.append("B")], rounds=3, pause=0)
    assert calls == ["A", "B"] * 4
    assert [len(t) for t in times] == [3, 3]


def test_a_spent_budget_leaves_the_least_rounds():
    times = measure.interleave([lambda: None], rounds=50, budget=0.0, pause=0)
    assert len(times[0]) == measure.LEAST_ROUNDS


def test_long_rounds_are_fewer_still(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "LONG", 0.0)
    assert len(measure.interleave([lambda: None], rounds=50, pause=0)[0]) == measure.FEWEST_ROUNDS


def test_a_call_that_takes_too_long_is_timed_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "ONCE", 0.01)
    times = measure.interleave([lambda: None, lambda: time.sleep(0.02)], rounds=4, pause=0)
    assert [len(t) for t in times] == [4, 1]


def test_a_candidate_that_would_take_too_long_sits_out():
    def sized(flop: int) -> Case:
        everyone = [Candidate("peftk", lambda: None), Candidate("peer", lambda: None)]
        return Case(f"{flop} flop", Work(8, 8, flop), everyone)

    patience, seconds = measure.Patience(), measure.TOO_LONG / 2
    patience.remember(sized(100), [measure.Row("a", "peftk", 0.1), measure.Row("a", "peer", seconds)])
    assert [c.run is None for c in patience.without_slow(sized(199)).candidates] == [False, False]
    left = patience.without_slow(sized(400))
    assert [c.run is None for c in left.candidates] == [False, True]
    assert left.candidates[1].note == f"left out: would take {4 * seconds:.0f} s"
    patience.remember(left, [measure.Row("b", "peftk", 0.4), measure.Row("b", "peer", note="left out")])
    assert patience.without_slow(sized(100)).candidates[1].run is not None


def test_a_case_warms_up_once():
    calls = []
    candidates = [Candidate(who, lambda who=who: calls.append(who)) for who in ("peftk", "peer")]
    measure.measure_case(case(*candidates), LIMITS, 2)
    assert calls == ["peftk", "peer"] * 3


def test_the_pause_is_not_timed():
    assert max(measure.interleave([lambda: None], rounds=2, pause=0.02)[0]) < 0.01


def test_the_clock_stops_before_a_result_is_freed():
    class SlowToFree:
        def __del__(self):
            time.sleep(0.02)

    assert max(measure.interleave([SlowToFree], rounds=2, pause=0)[0]) < 0.01


def test_garbage_is_not_collected_meanwhile():
    seen = []
    measure.interleave([lambda: seen.append(gc.isenabled())], rounds=2, pause=0)
    assert seen[1:] == [False, False] and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        measure.interleave([lambda: 1 / (len(seen) - 3), lambda: seen.append(0)], rounds=2, pause=0)
    assert gc.isenabled()


@pytest.mark.parametrize(("share", "expected"), [(0.9, 9), (0.5, 5), (1.0, 10), (0.0, 1), (0.91, 10)])
def test_percentile_is_the_nearest_rank(share: float, expected: int):
    assert measure.percentile([10, 1, 9, 2, 8, 3, 7, 4, 6, 5], share) == expected


def test_the_limit_is_memory_or_arithmetic():
    assert LIMITS.seconds(WORK) == pytest.approx(6e6 / 10e9 + 2e6 / 5e9)
    assert LIMITS.seconds(Work(0, 0, 200_000_000)) == pytest.approx(2e-3)
    assert LIMITS.seconds(Work(0, 0, 200_000_000, torch.float32)) == pytest.approx(4e-3)


def test_the_peak_is_the_higher_rate():
    with_registers = Limits(1, 1, 1, matmul=LIMITS.matmul, peak={torch.bfloat16: 125e9, torch.float32: 40e9})
    assert with_registers.rate(torch.bfloat16) == 125e9 and LIMITS.rate(torch.bfloat16) == 100e9
    assert with_registers.rate(torch.float32) == with_registers.rate(torch.float16) == 50e9


def test_what_binds_is_told():
    registers = Limits(10e9, 5e9, 8e9, LIMITS.matmul, peak={torch.bfloat16: 125e9, torch.float32: 40e9})
    assert registers.binding(WORK) == "10.0 GB/s read"
    assert registers.binding(Work(0, 0, 9)) == "125 GFLOP/s in registers"
    assert registers.binding(Work(0, 0, 9, torch.float16)) == "50 GFLOP/s by torch.matmul"
    assert LIMITS.binding(Work(0, 0, 9)) == "100 GFLOP/s by torch.matmul"


def test_limits_of_this_machine():
    here = limits.measure_limits(size=2**20, side=64, rounds=1)
    assert min(here.read, here.write, here.copy, *here.matmul.values()) > 1e6
    assert here.write >= here.copy / 2
    assert "GB/s" in str(here) and "torch.matmul bfloat16" in str(here)
    assert ("in registers bfloat16" in str(here)) == bool(here.peak)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
@pytest.mark.parametrize("tier", list(peak.LOOPS))
def test_the_register_loop_multiplies_all_that_it_counts(tier: str):
    """Faster than the clock allows would mean that the compiler has left sums out: so many instructions a cycle, 6 GHz."""
    most = {"avx2": 2, "avx512": 2, "avx512_bf16": 2, "amx_bf16": 1 / 16}
    if tier not in native_tiers():
        pytest.skip(f"this processor does not run {tier}")
    rates, why_not = peak.register_peak(tier, threads=1, rounds=2, steps=1 << 17)
    assert why_not == "" and set(rates) == set(limits.DTYPES)
    for dtype, rate in rates.items():
        loop = peak.LOOPS[tier][dtype]
        assert 1e9 < rate < 6e9 * most[loop] * peak.FLOP[loop]


def native_tiers() -> list[str]:
    from peftk.native import native

    return list(native().available_tiers()) if native() else []


def test_no_register_loop_says_why(monkeypatch: pytest.MonkeyPatch):
    assert peak.register_peak("scalar", 1) == ({}, "none for scalar")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert peak.register_peak("avx2", 1) == ({}, "no C compiler that builds it: no gcc and no cc")


def test_several_calls_are_timed_after_one_that_is_not():
    calls = []

    def run():
        calls.append(1)
        time.sleep(0.05 if len(calls) == 2 else 0.002)  # the call before the clock starts is slow

    (seconds,) = measure.interleave([run], rounds=1, pause=0, calls=4)[0]
    assert len(calls) == 1 + 1 + 4
    assert 0.002 <= seconds < 0.01


def test_a_runs_parts_share_its_time():
    whole, part = (
        measure.measure_case(case(sleeper("peftk", 0.02), parts=parts), LIMITS, 2, least=1)[0].p50 for parts in (1, 10)
    )
    assert whole >= 0.02 and part == pytest.approx(whole / 10, rel=0.5)


def test_candidates_have_their_own_threads():
    seen = []
    before = torch.get_num_threads()
    note = Candidate("peftk", lambda: seen.append(("peftk", torch.get_num_threads())))
    one = Candidate("one", lambda: seen.append(("one", torch.get_num_threads())), threads=1)
    try:
        torch.set_num_threads(2)
        measure.measure_case(case(note, one), LIMITS, 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen[2:] == [("peftk", 2), ("one", 1)]


def test_rows_hold_figures_ratio_and_verdict():
    ours, peer = measure.measure_case(case(sleeper("peftk", 0.002), sleeper("peer", 0.01), goals=Goal("peer", 2)), LIMITS, 3)
    assert (ours.who, peer.who, ours.rounds) == ("peftk", "peer", 3)
    assert 0.002 <= ours.p50 <= ours.p90
    assert peer.ratio == pytest.approx(peer.p50 / ours.p50) and ours.ratio is None
    assert ours.gb_s == pytest.approx(8e6 / ours.p50 / 1e9)
    assert ours.gflop_s == pytest.approx(4e6 / ours.p50 / 1e9)
    assert ours.share == pytest.approx(1e-3 / ours.p50)
    (verdict,) = ours.verdicts
    assert (verdict.goal, verdict.met) == (">= 2x peer", True) and verdict.reached == f"{peer.ratio:.2f}x"
    assert peer.verdicts == ()


def test_a_missed_goal_is_missed():
    ours, _ = measure.measure_case(case(sleeper("peftk", 0.003), sleeper("peer", 0.001), goals=Goal("peer", 1)), LIMITS, 2)
    assert ours.verdicts[0].met is False


def test_an_absent_peer_keeps_its_row():
    rows = measure.measure_case(
        case(sleeper("peftk", 0), Candidate("peer", note="not installed"), goals=Goal("peer", 2)), LIMITS, 1
    )
    assert [row.who for row in rows] == ["peftk", "peer"]
    assert rows[1].note == "not installed" and rows[1].p50 is None
    assert rows[0].verdicts[0].met is None


def test_a_candidates_own_work_counts():
    dense = Candidate("dense", lambda: time.sleep(0.001), work=Work(read=60_000_000, write=0))
    ours, other = measure.measure_case(case(sleeper("peftk", 0.001), dense), LIMITS, 2)
    assert other.gb_s == pytest.approx(60e6 / other.p50 / 1e9) and other.gflop_s is None


def test_errors_are_of_the_result():
    exact = Candidate("peftk", lambda: torch.ones(4), lambda y: measure.relative_error(y, torch.ones(4).double()))
    wrong = Candidate("peer", lambda: torch.full((4,), 1.5), lambda y: measure.relative_error(y, torch.ones(4).double()))
    rows = measure.measure_case(case(exact, wrong), LIMITS, 1)
    assert [row.error for row in rows] == [0.0, 0.5]


def test_a_failing_candidate_is_named():
    with pytest.raises(RuntimeError, match="a case: peer failed: .*by zero"):
        measure.measure_case(case(sleeper("peftk", 0), Candidate("peer", lambda: 1 // 0)), LIMITS, 1)


def test_ours_must_run():
    with pytest.raises(ValueError, match="expected our own candidate first and able to run, got 'no compiler'"):
        measure.measure_case(case(Candidate("peftk", note="no compiler"), sleeper("peer", 0)), LIMITS, 1)


def test_an_error_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"expected the truth's shape \(2, 2\), got \(4,\)"):
        measure.relative_error(torch.ones(4), torch.ones(2, 2).double())
