"""What is meant to be reached, beside what was measured."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.harness.records import Record
from benchmarks.harness.tables import table

NOT_YET = "not yet measured"

Measured = Callable[[Sequence[Record]], float | None]
"""Returns a figure of measurements that did not fail; None if they do not tell it."""


class Goal(NamedTuple):
    """A figure that is to be reached."""

    text: str
    wanted: float
    measured: Measured
    is_at_most: bool = False
    """Whether the figure must not be larger; otherwise it must not be smaller."""
    pass_: str = ""

    def verdict(self, records: Sequence[Record]) -> list[str]:
        """Return what was wanted, what was measured and whether that is enough."""
        value = self.measured([record for record in records if record.failure is None])
        wanted = f"{'at most' if self.is_at_most else 'at least'} {self.wanted:,g}"
        if value is None:
            return [wanted, NOT_YET, ""]
        is_met = value <= self.wanted if self.is_at_most else value >= self.wanted
        return [wanted, f"{value:.2f}", "yes" if is_met else "no"]


def goal_table(goals: Sequence[Goal], records: Sequence[Record]) -> str:
    """Return a row for each goal, with its pass if some of them have one."""
    has_pass = any(goal.pass_ for goal in goals)
    headings = ["goal", *["pass"] * has_pass, "wanted", "measured", "met"]
    return table(headings, [[goal.text, *[goal.pass_] * has_pass, *goal.verdict(records)] for goal in goals])
