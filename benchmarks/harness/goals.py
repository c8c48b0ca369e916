"""Goals of the benchmarks beside the measured figures."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.harness.records import Record
from benchmarks.harness.tables import table

NOT_MEASURED = "not yet measured"

Metric = Callable[[Sequence[Record]], float | None]
"""Returns a figure of records that did not fail; None if they do not contain it."""


class Goal(NamedTuple):
    """A figure to be reached."""

    text: str
    target: float
    metric: Metric
    is_at_most: bool = False
    """Whether the target is an upper bound; otherwise it is a lower bound."""
    pass_: str = ""

    def verdict(self, records: Sequence[Record]) -> list[str]:
        """Return the cells for target, measured figure, and "yes" or "no"."""
        value = self.metric([record for record in records if record.failure is None])
        target = f"{'at most' if self.is_at_most else 'at least'} {self.target:,g}"
        if value is None:
            return [target, NOT_MEASURED, ""]
        is_met = value <= self.target if self.is_at_most else value >= self.target
        return [target, f"{value:.2f}", "yes" if is_met else "no"]


def goal_table(goals: Sequence[Goal], records: Sequence[Record]) -> str:
    """Return a table with a row per goal, and a column for the pass if any goal has one."""
    has_pass = any(goal.pass_ for goal in goals)
    headings = ["goal", *["pass"] * has_pass, "target", "measured", "met"]
    return table(headings, [[goal.text, *[goal.pass_] * has_pass, *goal.verdict(records)] for goal in goals])
