"""The measurements of frozen features: names of the records, goal and table."""

from collections.abc import Sequence

from benchmarks.harness import tables
from benchmarks.harness.goals import Goal, goal_table
from benchmarks.harness.records import Record
from benchmarks.harness.tables import describe, figure, record_table, time

FEATURES = "frozen features"
FORWARD, POOLED, TOKENS = "forward alone", "extraction, pooled", "extraction, tokens"


def sections(records: Sequence[Record], level: str = "###") -> str:
    """Return every table that has something in it, each under a heading, the goals first."""
    found = {"Goals": goal_table(GOALS, records), "Extraction": _speeds(records)}
    return tables.sections(found, records, level)


def slowest_percent(records: Sequence[Record]) -> float | None:
    """Return how much longer the slower kind of extraction takes than the forward in the same round."""
    return max((record.figures["over_percent"] for record in records if "over_percent" in record.figures), default=None)


GOALS = (Goal("extraction over the encoder's own forward, %", 10.0, slowest_percent, is_at_most=True),)


def _speeds(records: Sequence[Record]) -> str:
    timed = [record for record in records if record.what == FEATURES and record.failure is None]
    if not timed:
        return ""
    columns = {
        "who": tables.provider,
        "images/s": figure("images_per_s", ".2f"),
        "s": time("median_ms", ".2f", 1e3),
        "turns": lambda record: "-".join(time(name, ".2f", 1e3)(record) for name in ("p20_ms", "p80_ms")),
        "over forward, %": figure("over_percent", ".1f"),
    }
    shapes = dict.fromkeys(describe(record.shape) for record in timed)
    return f"{record_table(timed, columns)}\n\n{'; '.join(shapes)}."
