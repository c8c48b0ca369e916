"""The data pipeline's measurements: names of the records, goals and tables."""

from collections.abc import Callable, Iterable, Sequence

from benchmarks.harness.goals import HEADINGS, Goal, verdict
from benchmarks.harness.records import Record
from benchmarks.harness.tables import describe, failures, table

READ, DECODE, CROP, VIEWS = TASKS = ("read", "read, decode", "read, decode crop, resize", "two views")
SAME_VIEWS = "same views"
"""Our loader beside its plain twin: by how many grey levels pixels differ."""
CONDITIONALS = "decode to views"
SWEEP = "two views, decoder sweep"
LOGGING = "action log"
SHUFFLING, MEMORY, OPENING = "shuffling", "memory", "opening shards"

OURS, LOGGED, TWIN = "ours", "ours, action log", "plain twin"
DALI_READER, LIBRARY_READER = "DALI webdataset", "webdataset library"
PEER = "webdataset + torchvision"

WARM, COLD = "memory", "disk"
"""Where the shards are read from."""

MOST_LEFT_IN_MEMORY = 0.01
"""Share of the shards that the kernel may still hold where they are read from the disk."""

_STREAMS = (*TASKS, CONDITIONALS, SWEEP)


def sections(records: Sequence[Record], level: str = "###") -> str:
    """Return every table that has something in it, each under a heading, the goals first."""
    found = {"Goals": table(HEADINGS, goal_rows(records))}
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


CORES = 16
"""Of a GPU's share of a machine, in the goal for one."""


def goal_rows(records: Sequence[Record]) -> list[list[str]]:
    """Return a row for each goal: text, wanted, measured, whether it is met."""
    able = [record for record in records if record.failure is None]
    return [[goal.text, *verdict(goal, reached(able))] for goal, reached in _goals()]


def _goals() -> list[tuple[Goal, Callable[[Sequence[Record]], float | None]]]:
    return [
        (_goal("two views: ours / the fastest webdataset + torchvision, images/s", 3.0), over_peer),
        (_goal("action log: share of the cores' time, %", 1.0, is_at_most=True), log_share),
        (_goal("growth of memory over 2,000 batches, %", 2.0, is_at_most=True), growth),
        (_goal("opening 1,000 shards of 1.28 million samples, s", 5.0, is_at_most=True), opening_s),
        (_goal(f"two views on a GPU with {CORES} cores, images/s", 9000.0), on_gpu),
    ]


def _goal(text: str, wanted: float, *, is_at_most: bool = False) -> Goal:
    return Goal(text, "", {}, "", wanted, is_at_most=is_at_most)


def over_peer(records: Sequence[Record]) -> float | None:
    """Return our images per second over the fastest peer's."""
    views = {record.provider: record for record in _warm_views(records)}
    peers = [record.figures["images_per_s"] for name, record in views.items() if name.startswith(PEER)]
    return views[OURS].figures["images_per_s"] / max(peers) if OURS in views and peers else None


def _warm_views(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.what == VIEWS and record.shape["from"] == WARM]


def log_share(records: Sequence[Record]) -> float | None:
    """Return what logging an image takes of a processor, in percent of what all cores spend on one."""
    logs = [record.figures["cpu_us_per_image"] for record in records if record.what == LOGGING]
    speeds = [record.figures["images_per_s_per_core"] for record in _warm_views(records) if record.provider == OURS]
    return 100 * 1e-6 * logs[0] * speeds[0] if logs and speeds else None


def growth(records: Sequence[Record]) -> float | None:
    """Return by how many percent the loader's memory has grown."""
    return _first(record.figures["growth_percent"] for record in records if record.what == MEMORY)


def opening_s(records: Sequence[Record]) -> float | None:
    """Return the seconds until all shards are open."""
    return _first((record.median_ms or 0.0) / 1e3 for record in records if record.what == OPENING)


def on_gpu(records: Sequence[Record]) -> float | None:
    """Return the most images per second into two views on a GPU with no more cores than the goal has."""
    whats = (VIEWS, SWEEP)
    fitting = [
        record.figures["images_per_s"]
        for record in records
        if record.what in whats
        and record.provider == OURS
        and record.machine.get("gpu")
        and record.machine["cores"] <= CORES
    ]
    return max(fitting, default=None)


def _first(values: Iterable[float | None]) -> float | None:
    return next(iter(values), None)
