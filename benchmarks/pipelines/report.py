"""The data pipeline's measurements: names of the records, goals and tables."""

from collections.abc import Callable, Sequence

from benchmarks.harness import tables
from benchmarks.harness.goals import Goal, Measured, goal_table
from benchmarks.harness.records import Record
from benchmarks.harness.tables import Column, describe, figure, record_table, shape, time

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


CORES = 16
"""Of a GPU's share of a machine, in the goal for one."""


def sections(records: Sequence[Record], level: str = "###") -> str:
    """Return every table that has something in it, each under a heading, the goals first."""
    found = {"Goals": goal_table(GOALS, records), "Images per second": streams(records)}
    for heading, (what, columns) in _FIGURES.items():
        chosen = [record for record in records if record.what == what]
        about = f"\n\n{describe(chosen[0].shape)}." if chosen and what == SHUFFLING else ""
        found[heading] = record_table(chosen, columns) + about
    return tables.sections(found, records, level)


_FIGURES: dict[str, tuple[str, dict[str, Column]]] = {
    "Action log": (
        LOGGING,
        {
            "rows": figure("rows"),
            "processor, us per image": figure("cpu_us_per_image"),
            "from call to disk, us per image": figure("us_per_image"),
            "bytes per image": figure("bytes_per_image"),
        },
    ),
    "Shuffling sorted shards": (
        SHUFFLING,
        {
            "order": tables.provider,
            "effective shards in a batch": figure("effective_shards"),
            "over a full shuffle's": figure("of_full_shuffle"),
            "pairs together again, over chance": figure("pairs_again"),
            "files at once": figure("files"),
            "samples buffered": figure("buffered_samples"),
        },
    ),
    "Memory of the loader": (
        MEMORY,
        {
            "batches": figure("batches"),
            "settled after": figure("settled"),
            "MB then": figure("first_mb"),
            "MB at the end": figure("last_mb"),
            "growth, %": figure("growth_percent"),
            "bytes per batch": figure("slope_bytes_per_batch"),
        },
    ),
    "Opening shards": (
        OPENING,
        {
            "shards": shape("shards"),
            "samples": shape("samples"),
            "median s": time("median_ms", ".2f", 1e3),
            "p20": time("p20_ms", ".2f", 1e3),
            "p80": time("p80_ms", ".2f", 1e3),
            "digest of keys and sizes, s": figure("digest_s", ".2f"),
        },
    ),
}
"""Tables by their headings: what the records are of, and columns."""


def streams(records: Sequence[Record]) -> str:
    """Return images per second, the 20th and 80th percentile of the turns, and how long a batch is waited for."""
    timed = [record for record in records if record.what in _STREAMS and record.failure is None]
    if not timed:
        return ""
    columns = {
        "task": _task,
        "from": _source,
        "who": tables.provider,
        "images/s": figure("images_per_s", ".0f"),
        "turns": tables.image_rates(".0f"),
        "per core": figure("images_per_s_per_core", ".0f"),
        "batch p50 ms": figure("batch_p50_ms", ".1f"),
        "p99 ms": figure("batch_p99_ms", ".1f"),
    }
    shapes = dict.fromkeys(describe({name: one.shape[name] for name in ("B", "image", "view")}) for one in timed)
    return f"{record_table(timed, columns)}\n\n{'; '.join(shapes)}.{_difference(records)}"


def _task(record: Record) -> str:
    if record.what != SWEEP:
        return record.what
    return f"{record.what}: {record.shape['threads']} threads, hw_decoder_load {record.shape['hw_decoder_load']}"


def _source(record: Record) -> str:
    source = str(record.shape.get("from", WARM))
    is_doubtful = record.figures.get("share_left_in_memory", 0) > MOST_LEFT_IN_MEMORY
    return f"{source}, or memory" if is_doubtful else source


def _difference(records: Sequence[Record]) -> str:
    found = [record.figures for record in records if record.what == SAME_VIEWS]
    if not found:
        return ""
    mean, most = found[0]["mean_difference"], found[0]["p99_difference"]
    return f" Ours and its plain twin differ by {mean} grey levels on average, {most:.0f} at the 99th percentile."


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


def _first(what: str, value: Callable[[Record], float]) -> Measured:
    return lambda records: next((value(record) for record in records if record.what == what), None)


GOALS = (
    Goal("two views: ours / the fastest webdataset + torchvision, images/s", 3.0, over_peer),
    Goal("action log: share of the cores' time, %", 1.0, log_share, is_at_most=True),
    Goal(
        "growth of memory over 2,000 batches, %",
        2.0,
        _first(MEMORY, lambda record: record.figures["growth_percent"]),
        is_at_most=True,
    ),
    Goal(
        "opening 1,000 shards of 1.28 million samples, s",
        5.0,
        _first(OPENING, lambda record: (record.median_ms or 0.0) / 1e3),
        is_at_most=True,
    ),
    Goal(f"two views on a GPU with {CORES} cores, images/s", 9000.0, on_gpu),
)
