"""bench/measure.py: order, clocks, verdicts."""

import gc
import time

import pytest
import torch

from bench import measure
from bench.measure import Candidate, Case, Goal, Limits, Work

LIMITS = Limits(read=10e9, write=5e9, copy=8e9, peak={torch.bfloat16: 100e9, torch.float32: 50e9})
WORK = Work(read=6_000_000, write=2_000_000, flop=4_000_000)


def case(*candidates: Candidate, goal: Goal | None = None) -> Case:
    return Case("a case", WORK, candidates, goal)


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


def test_limits_of_this_machine():
    limits = measure.measure_limits(size=2**20, side=64, rounds=1)
    assert min(limits.read, limits.write, limits.copy, *limits.peak.values()) > 1e6
    assert limits.write >= limits.copy / 2
    assert "GB/s" in str(limits) and "bfloat16" in str(limits)


def test_rows_hold_figures_ratio_and_verdict():
    ours, peer = measure.measure_case(case(sleeper("peftk", 0.002), sleeper("peer", 0.01), goal=Goal("peer", 2)), LIMITS, 3)
    assert (ours.who, peer.who, ours.rounds) == ("peftk", "peer", 3)
    assert 0.002 <= ours.p50 <= ours.p90
    assert peer.ratio == pytest.approx(peer.p50 / ours.p50) and ours.ratio is None
    assert ours.gb_s == pytest.approx(8e6 / ours.p50 / 1e9)
    assert ours.gflop_s == pytest.approx(4e6 / ours.p50 / 1e9)
    assert ours.share == pytest.approx(1e-3 / ours.p50)
    assert (ours.goal, ours.met) == (">= 2x peer", True) and (peer.goal, peer.met) == ("", None)


def test_a_missed_goal_is_missed():
    ours, _ = measure.measure_case(case(sleeper("peftk", 0.003), sleeper("peer", 0.001), goal=Goal("peer", 1)), LIMITS, 2)
    assert ours.met is False


def test_an_absent_peer_keeps_its_row():
    rows = measure.measure_case(
        case(sleeper("peftk", 0), Candidate("peer", note="not installed"), goal=Goal("peer", 2)), LIMITS, 1
    )
    assert [row.who for row in rows] == ["peftk", "peer"]
    assert rows[1].note == "not installed" and rows[1].p50 is None
    assert rows[0].met is None


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
