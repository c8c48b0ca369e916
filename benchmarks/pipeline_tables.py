"""The measurements of the data line as tables: on the terminal and in the README."""

from collections.abc import Sequence

from benchmarks import pipeline_goals
from benchmarks.pipeline_names import CONDITIONALS, LOGGING, MEMORY, OPENING, SAME_VIEWS, SHUFFLING, SWEEP, TASKS, WARM
from benchmarks.records import Record
from benchmarks.tables import describe, failures, table

MOST_LEFT_IN_MEMORY = 0.01
"""Share of the shards that the kernel may still hold where they are read from the disk."""

_STREAMS = (*TASKS, CONDITIONALS, SWEEP)


def sections(records: Sequence[Record], level: str = "###") -> str:
    """Return every table that has something in it, each under a heading, the goals first."""
    found = {"Goals": table(pipeline_goals.HEADINGS, pipeline_goals.rows(records))}
    found |= {
        "Images per second": streams(records),
        "Action log": logging(records),
        "Shuffling sorted shards": shuffling(records),
        "Memory of the loader": memory(records),
        "Opening shards": opening(records),
        "Raised": "\n".join(f"- {line}" for line in failures(records)),
    }
    return "\n\n".join(f"{level} {heading}\n\n{text}" for heading, text in found.items() if text)


def streams(records: Sequence[Record]) -> str:
    """Return images per second, the 20th and 80th percentile of the turns, and how long a batch is waited for."""
    timed = [record for record in records if record.what in _STREAMS and record.failure is None]
    if not timed:
        return ""
    headings = ["task", "from", "who", "images/s", "turns", "per core", "batch p50 ms", "p99 ms"]
    rows = [[*_place(record), record.provider, *_speed(record)] for record in timed]
    shapes = dict.fromkeys(describe(_common(record)) for record in timed)
    return f"{table(headings, rows)}\n\n{'; '.join(shapes)}.{_difference(records)}"


def _difference(records: Sequence[Record]) -> str:
    found = [record.figures for record in records if record.what == SAME_VIEWS]
    if not found:
        return ""
    mean, most = found[0]["mean_difference"], found[0]["p99_difference"]
    return f" Ours and its plain twin differ by {mean} grey levels on average, {most:.0f} at the 99th percentile."


def _place(record: Record) -> list[str]:
    if record.what == SWEEP:
        choice = f"{record.shape['threads']} threads, hw_decoder_load {record.shape['hw_decoder_load']}"
        return [f"{record.what}: {choice}", WARM]
    place = str(record.shape.get("from", WARM))
    is_doubtful = record.figures.get("share_left_in_memory", 0) > MOST_LEFT_IN_MEMORY
    return [record.what, f"{place}, or memory" if is_doubtful else place]


def _common(record: Record) -> dict[str, int | str]:
    return {name: record.shape[name] for name in ("B", "image", "view")}


def _speed(record: Record) -> list[str]:
    figures, images = record.figures, 1e3 * int(record.shape["B"])
    slow, fast = images / (record.p80_ms or 1.0), images / (record.p20_ms or 1.0)
    waits = [f"{figures[name]:.1f}" for name in ("batch_p50_ms", "batch_p99_ms")]
    return [
        f"{figures['images_per_s']:.0f}",
        f"{slow:.0f}-{fast:.0f}",
        f"{figures['images_per_s_per_core']:.0f}",
        *waits,
    ]


def logging(records: Sequence[Record]) -> str:
    """Return what logging an image costs."""
    found = [record for record in records if record.what == LOGGING]
    names = ["rows", "cpu_us_per_image", "us_per_image", "bytes_per_image"]
    headings = ["rows", "processor, us per image", "from call to disk, us per image", "bytes per image"]
    return table(headings, [[record.figures[name] for name in names] for record in found]) if found else ""


def shuffling(records: Sequence[Record]) -> str:
    """Return how well each order mixes."""
    found = [record for record in records if record.what == SHUFFLING]
    if not found:
        return ""
    names = ["effective_shards", "of_full_shuffle", "pairs_again", "files", "buffered_samples"]
    headings = [
        "order",
        "effective shards in a batch",
        "over a full shuffle's",
        "pairs together again, over chance",
        "files at once",
        "samples buffered",
    ]
    rows = [[record.provider, *(record.figures[name] for name in names)] for record in found]
    return f"{table(headings, rows)}\n\n{describe(found[0].shape)}."


def memory(records: Sequence[Record]) -> str:
    """Return resident memory at both ends."""
    found = [record for record in records if record.what == MEMORY]
    if not found:
        return ""
    names = ["batches", "settled", "first_mb", "last_mb", "growth_percent", "slope_bytes_per_batch"]
    headings = ["batches", "settled after", "MB then", "MB at the end", "growth, %", "bytes per batch"]
    return table(headings, [[record.figures[name] for name in names] for record in found])


def opening(records: Sequence[Record]) -> str:
    """Return how long it takes until shards are open."""
    found = [record for record in records if record.what == OPENING]
    if not found:
        return ""
    headings = ["shards", "samples", "median s", "p20", "p80", "digest of keys and sizes, s"]
    rows = [
        [
            record.shape["shards"],
            record.shape["samples"],
            *(f"{(spent or 0) / 1e3:.2f}" for spent in (record.median_ms, record.p20_ms, record.p80_ms)),
            f"{record.figures['digest_s']:.2f}",
        ]
        for record in found
    ]
    return table(headings, rows)
