"""Report of frozen features: names of the records, goal and table."""

from collections.abc import Sequence

from benchmarks.harness import tables
from benchmarks.harness.goals import Goal, goal_table
from benchmarks.harness.records import Record
from benchmarks.harness.tables import describe, figure, record_table, time

FEATURES = "frozen features"
FORWARD, POOLED, TOKENS = "forward alone", "extraction, pooled", "extraction, tokens"


def sections(records: Sequence[Record], level: str = "###") -> str:
    """Return the non-empty tables under headings of this level, the goals first."""
    texts = {"Goals": goal_table(GOALS, records), "Extraction": _speeds(records)}
    return tables.sections(texts, records, level)


def max_overhead_percent(records: Sequence[Record]) -> float | None:
    """Return by how many percent the slower kind of extraction takes longer than the forward pass."""
    return max((record.figures["over_percent"] for record in records if "over_percent" in record.figures), default=None)


GOALS = (Goal("overhead of an extraction over the encoder's forward, %", 10.0, max_overhead_percent, is_at_most=True),)


def _speeds(records: Sequence[Record]) -> str:
    timed = [record for record in records if record.what == FEATURES and record.failure is None]
    columns = {
        "provider": tables.provider,
        "images/s": figure("images_per_s", ".2f"),
        "s": time("median_ms", ".2f", 1e3),
        "p20-p80": lambda record: "-".join(time(name, ".2f", 1e3)(record) for name in ("p20_ms", "p80_ms")),
        "overhead, %": figure("over_percent", ".1f"),
    }
    return record_table(timed, columns, [describe(record.shape) for record in timed])
