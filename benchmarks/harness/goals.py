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
    expected: str = ""
    """Odds of reaching it that were estimated before the first measurement."""

    def verdict(self, records: Sequence[Record]) -> list[str]:
        """Return the cells for target, measured figure, and "yes" or "no"."""
        value = self.metric([record for record in records if record.failure is None])
        target = f"{'at most' if self.is_at_most else 'at least'} {self.target:,g}"
        if value is None:
            return [target, NOT_MEASURED, ""]
        is_met = value <= self.target if self.is_at_most else value >= self.target
        return [target, f"{value:.2f}", "yes" if is_met else "no"]


def goal_table(goals: Sequence[Goal], records: Sequence[Record]) -> str:
    """Return a table with a row per goal, and columns for pass and estimated odds if any goal has them."""
    optional = {"pass": [goal.pass_ for goal in goals], "odds, est.": [goal.expected for goal in goals]}
    columns = {name: cells for name, cells in optional.items() if any(cells)}
    rows = [
        [goal.text, *(cells[number] for cells in columns.values()), *goal.verdict(records)]
        for number, goal in enumerate(goals)
    ]
    return table(["goal", *columns, "target", "measured", "met"], rows)
