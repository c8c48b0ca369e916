"""The measurements of training steps as tables: on the terminal and in the README."""

from collections.abc import Sequence

from benchmarks import step_goals
from benchmarks.records import Record
from benchmarks.step_names import LOADING, STEP
from benchmarks.tables import describe, failures, table
from iwm_fast.stopwatch import PARTS


def sections(records: Sequence[Record], level: str = "###") -> str:
    """Return every table that has something in it, each under a heading, the goals first."""
    timed = [record for record in records if record.what in (STEP, LOADING) and record.failure is None]
    found = {
        "Goals": table(step_goals.HEADINGS, step_goals.rows(records)),
        "Steps": speeds(timed),
        "Parts of a step, ms": parts(timed),
        "Raised": "\n".join(f"- {line}" for line in failures(records)),
    }
    return "\n\n".join(f"{level} {heading}\n\n{text}" for heading, text in found.items() if text)


def speeds(timed: Sequence[Record]) -> str:
    """Return images per second, the 20th and 80th percentile of the turns, and what an engine takes beyond its base."""
    if not timed:
        return ""
    headings = ["ranks", "who", "images/s", "turns", "ms per step", "over", "by, %", "MFU, %", "memory, GB"]
    rows = [_speed(record) for record in timed]
    peaks = dict.fromkeys(str(record.figures["peak"]) for record in timed if "peak" in record.figures)
    shapes = dict.fromkeys(describe(_common(record)) for record in timed)
    return f"{table(headings, rows)}\n\n{'; '.join([*shapes, *peaks])}."


def _speed(record: Record) -> list[str]:
    figures, images = record.figures, 1e3 * int(record.shape["B"])
    slow, fast = images / (record.p80_ms or 1.0), images / (record.p20_ms or 1.0)
    over = f"{figures['over_percent']:.1f}" if "over_percent" in figures else "-"
    return [
        str(record.shape["ranks"]),
        _who(record),
        f"{figures['images_per_s']:.1f}",
        f"{slow:.1f}-{fast:.1f}",
        f"{record.median_ms or 0.0:.1f}",
        str(figures.get("over", "-")),
        over,
        f"{figures['mfu_percent']:.1f}" if "mfu_percent" in figures else "-",
        f"{figures['memory_gb']:.1f}" if "memory_gb" in figures else "-",
    ]


def _who(record: Record) -> str:
    return f"{record.shape['engine']}, {record.provider}" if record.what == LOADING else record.provider


def _common(record: Record) -> dict[str, int | str]:
    return {"networks": record.shape["model"], "view": record.shape["view"], "B": record.shape["B"]} | {
        "precision": record.dtype
    }


def parts(timed: Sequence[Record]) -> str:
    """Return where the time of a step goes, and the shares that have goals."""
    if not timed:
        return ""
    headings = ["ranks", "who", *(part.replace("_", " ") for part in PARTS), "waiting, %", "teacher update, %"]
    rows = [
        [
            str(record.shape["ranks"]),
            _who(record),
            *(f"{record.figures[f'{part}_ms']:.2f}" for part in PARTS),
            f"{record.figures['wait_percent']:.2f}",
            f"{record.figures['teacher_update_percent']:.2f}",
        ]
        for record in timed
    ]
    return table(headings, rows)
