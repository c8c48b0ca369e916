"""The measurements of frozen features as a table: on the terminal and in the README."""

from collections.abc import Sequence

from benchmarks.harness.goals import Goal, verdict
from benchmarks.harness.records import Record
from benchmarks.harness.tables import describe, failures, table

FEATURES = "frozen features"
FORWARD, POOLED, TOKENS = "forward alone", "extraction, pooled", "extraction, tokens"

_GOAL = Goal("extraction over the encoder's own forward, %", "", {}, "", 10.0, is_at_most=True)


def sections(records: Sequence[Record], level: str = "###") -> str:
    """Return the table, the goal first."""
    timed = [record for record in records if record.what == FEATURES and record.failure is None]
    if not timed:
        return ""
    found = {
        "Goals": table(["goal", "wanted", "measured", "met"], [[_GOAL.text, *verdict(_GOAL, slowest_percent(timed))]]),
        "Extraction": _speeds(timed),
        "Raised": "\n".join(f"- {line}" for line in failures(records)),
    }
    return "\n\n".join(f"{level} {heading}\n\n{text}" for heading, text in found.items() if text)


def slowest_percent(timed: Sequence[Record]) -> float | None:
    """Return how much longer the slower kind of extraction takes than the forward in the same round."""
    return max((record.figures["over_percent"] for record in timed if "over_percent" in record.figures), default=None)


def _speeds(timed: Sequence[Record]) -> str:
    rows = [
        [
            record.provider,
            f"{record.figures['images_per_s']:.2f}",
            f"{(record.median_ms or 0.0) / 1e3:.2f}",
            f"{(record.p20_ms or 0.0) / 1e3:.2f}-{(record.p80_ms or 0.0) / 1e3:.2f}",
            f"{record.figures['over_percent']:.1f}" if "over_percent" in record.figures else "-",
        ]
        for record in timed
    ]
    shapes = dict.fromkeys(describe(record.shape) for record in timed)
    return f"{table(['who', 'images/s', 's', 'turns', 'over forward, %'], rows)}\n\n{'; '.join(shapes)}."
