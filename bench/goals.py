"""What a case must reach: so many times as fast as a peer, such a share of a limit, at most so long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What was measured in a case, as far as goals look at it."""

    ours: str
    p50: Mapping[str, float]  # s, by candidate; those that could not run are absent
    share: float | None = None  # of the limit, ours
    limit: str = ""  # what that is, with its figure


@dataclass(frozen=True)
class Verdict:
    """A goal, what was reached, and whether that is enough; None where there was nothing to compare with."""

    goal: str
    reached: str = ""
    met: bool | None = None

    @property
    def word(self) -> str:
        return {True: "met", False: "missed", None: "not compared"}[self.met]

    def __str__(self) -> str:
        return f"{self.goal}: {self.word}" + (f" ({self.reached})" if self.reached else "")


@dataclass(frozen=True)
class Goal:
    """At least ``ratio`` times as fast as the candidate ``who``; of several, as the fastest of those that could run."""

    who: str | tuple[str, ...]
    ratio: float

    def peers(self) -> tuple[str, ...]:
        return (self.who,) if isinstance(self.who, str) else self.who

    def __str__(self) -> str:
        peers = self.peers()
        return f">= {self.ratio:g}x " + (peers[0] if len(peers) == 1 else f"the better of {' and '.join(peers)}")

    def judge(self, outcome: Outcome) -> Verdict:
        there = [outcome.p50[who] for who in self.peers() if who in outcome.p50]
        if not there:
            return Verdict(str(self))
        ratio = min(there) / outcome.p50[outcome.ours]
        return Verdict(str(self), f"{ratio:.2f}x", ratio >= self.ratio)


@dataclass(frozen=True)
class ShareGoal:
    """At least this share of what limits the case: ``of`` names it."""

    share: float
    of: str

    def __str__(self) -> str:
        return f">= {self.share * 100:g} % of the {self.of}"

    def judge(self, outcome: Outcome) -> Verdict:
        if outcome.share is None:
            return Verdict(str(self))
        reached = f"{outcome.share * 100:.0f} %" + (f" of {outcome.limit}" if outcome.limit else "")
        return Verdict(str(self), reached, outcome.share >= self.share)


@dataclass(frozen=True)
class TimeGoal:
    """At most so long a call."""

    seconds: float

    def __str__(self) -> str:
        return f"<= {self.seconds * 1e6:g} us"

    def judge(self, outcome: Outcome) -> Verdict:
        p50 = outcome.p50[outcome.ours]
        return Verdict(str(self), f"{p50 * 1e6:.1f} us", p50 <= self.seconds)


AnyGoal = Goal | ShareGoal | TimeGoal


def as_goals(goals: AnyGoal | Sequence[AnyGoal]) -> tuple[AnyGoal, ...]:
    """One goal or several, as several."""
    return tuple(goals) if isinstance(goals, Sequence) else (goals,)


def named_peers(goals: AnyGoal | Sequence[AnyGoal]) -> Iterator[str]:
    """Every candidate that the goals compare with."""
    for goal in as_goals(goals):
        if isinstance(goal, Goal):
            yield from goal.peers()


@dataclass(frozen=True)
class PartGoal:
    """Of ``ranks`` processes each holds its part of what one would hold, and at most ``more`` of that beside it."""

    ranks: int
    more: float = 0.02

    def __str__(self) -> str:
        return f"1/{self.ranks} of one process"

    def judge(self, held: int, alone: int) -> Verdict:
        """Bytes of one of them, and of one process by itself."""
        return Verdict(str(self), f"1/{alone / held:.3g}", held <= alone / self.ranks * (1 + self.more))


@dataclass(frozen=True)
class PlanGoal:
    """Just so many bytes, which the planner calculated."""

    planned: int

    def __str__(self) -> str:
        return f"{self.planned / 1e6:.3f} MB, as planned"

    def judge(self, counted: int) -> Verdict:
        return Verdict(str(self), f"{counted / 1e6:.3f} MB", counted == self.planned)
