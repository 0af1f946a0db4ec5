"""bench/goals.py: what is met, what is missed, what was not compared."""

import pytest

from bench.goals import Goal, Outcome, PartGoal, PlanGoal, ShareGoal, TimeGoal, Verdict, as_goals, named_peers

OUTCOME = Outcome("peftk", {"peftk": 0.01, "slow": 0.03, "slower": 0.04}, share=0.89)


@pytest.mark.parametrize(
    ("goal", "verdict"),
    [
        (Goal("slow", 3), Verdict(">= 3x slow", "3.00x", True)),
        (Goal("slow", 3.1), Verdict(">= 3.1x slow", "3.00x", False)),
        (Goal("absent", 2), Verdict(">= 2x absent", "", None)),
        (Goal(("slower", "slow"), 3.5), Verdict(">= 3.5x the better of slower and slow", "3.00x", False)),
        (Goal(("slower", "absent"), 3.5), Verdict(">= 3.5x the better of slower and absent", "4.00x", True)),
        (Goal(("absent", "gone"), 1), Verdict(">= 1x the better of absent and gone", "", None)),
        (ShareGoal(0.9, "bf16 peak"), Verdict(">= 90 % of the bf16 peak", "89 %", False)),
        (ShareGoal(0.85, "bf16 peak"), Verdict(">= 85 % of the bf16 peak", "89 %", True)),
        (TimeGoal(10e-3), Verdict("<= 10000 us", "10000.0 us", True)),
        (TimeGoal(9e-3), Verdict("<= 9000 us", "10000.0 us", False)),
    ],
    ids=lambda value: str(value) if not isinstance(value, Verdict) else "",
)
def test_verdicts(goal, verdict: Verdict):
    assert goal.judge(OUTCOME) == verdict and str(goal) == verdict.goal


def test_a_share_says_of_what():
    outcome = Outcome("peftk", {"peftk": 1.0}, 0.5, "463 GFLOP/s in registers")
    assert ShareGoal(0.9, "peak").judge(outcome).reached == "50 % of 463 GFLOP/s in registers"


def test_no_share_no_comparison():
    assert ShareGoal(0.9, "peak").judge(Outcome("peftk", {"peftk": 1.0})).met is None


def test_a_verdict_in_words():
    assert str(Verdict("a goal", "1.20x", True)) == "a goal: met (1.20x)"
    assert str(Verdict("a goal", "0.80x", False)) == "a goal: missed (0.80x)"
    assert str(Verdict("a goal")) == "a goal: not compared"


def test_one_goal_or_several():
    goals = Goal("a", 1), Goal(("b", "c"), 1), TimeGoal(1)
    assert as_goals(goals[0]) == goals[:1] and as_goals(goals) == goals and as_goals(()) == ()
    assert list(named_peers(goals)) == ["a", "b", "c"]


@pytest.mark.parametrize(("held", "met"), [(250, True), (255, True), (256, False), (1000, False)])
def test_a_part_for_each_process(held: int, met: bool):
    verdict = PartGoal(4).judge(held, 1000)
    assert verdict.met is met and str(verdict).startswith("1/4 of one process: ")


def test_as_planned():
    assert PlanGoal(1_500_000).judge(1_500_000).met and not PlanGoal(1_500_000).judge(1_500_001).met
    assert str(PlanGoal(1_500_000)) == "1.500 MB, as planned"
