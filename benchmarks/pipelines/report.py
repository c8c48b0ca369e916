"""Report of the data pipeline: names of the records, goals and tables."""

from collections.abc import Sequence

from benchmarks.harness import tables
from benchmarks.harness.goals import Goal, Metric, goal_table
from benchmarks.harness.records import Record
from benchmarks.harness.tables import Column, describe, figure, record_table, shape, time

READ, DECODE, CROP, VIEWS = STAGES = ("read", "read, decode", "read, decode crop", "two views")
SAME_VIEWS = "same views"
"""Difference in grey levels between the pixels of our DALI loader and of our PyTorch loader."""
SWEEP = "two views, decoder sweep"
LOGGING = "action log"
SHUFFLING, MEMORY, OPENING = "shuffling", "memory", "opening shards"
SMALLER = "smaller shards"
OPENING_ON_RANKS, INDEXING = "opening a data set on all ranks of a machine", "indexing new shards"

OURS, LOGGED, TORCH_LOADER = "ours", "ours, action log", "plain twin"
DALI_READER, WEBDATASET_READER = "DALI webdataset", "webdataset library"
DALI_VIEWS = "DALI webdataset, DALI's operators"
TORCHVISION = "webdataset + torchvision"
THREADS = "threads of one process"

WARM, COLD = "memory", "disk"
"""Source of the shards: the page cache, or the disk."""

MAX_SHARE_LEFT_IN_MEMORY = 0.01
"""Share of the shards that may stay in the page cache in a measurement from the disk."""

_STREAMS = (*STAGES, SWEEP)

CORES = 16
"""CPU cores per GPU in the goal for a GPU."""


def sections(records: Sequence[Record], level: str = "###") -> str:
    """Return the non-empty tables under headings of this level, the goals first."""
    texts = {"Goals": goal_table(GOALS, records), "CPU time and images per second": streams(records)}
    for heading, (what, columns) in _FIGURES.items():
        selected = [record for record in records if record.what == what]
        captions = [describe(record.shape) for record in selected] if what == SHUFFLING else ()
        extrapolated = _extrapolate(selected) if what == OPENING_ON_RANKS else ""
        texts[heading] = record_table(selected, columns, captions) + extrapolated
    return tables.sections(texts, records, level)


_SETS = {"shards": shape("shards"), "samples": shape("samples")}
_SECONDS = {"median s": time("median_ms", ".2f", 1e3), "p20": time("p20_ms", ".2f", 1e3),
            "p80": time("p80_ms", ".2f", 1e3)}  # fmt: skip

_FIGURES: dict[str, tuple[str, dict[str, Column]]] = {
    "Action log": (LOGGING, {
        "rows": figure("rows"),
        "CPU time, us per image": figure("cpu_us_per_image"),
        "elapsed, us per image": figure("us_per_image"),
        "bytes per image": figure("bytes_per_image"),
    }),
    "Shuffling sorted shards": (SHUFFLING, {
        "order": tables.provider,
        "effective shards per batch": figure("effective_shards"),
        "relative to a full shuffle": figure("of_full_shuffle"),
        "repeated pairs, relative to chance": figure("pairs_again"),
        "files read at once": figure("files"),
        "samples buffered": figure("buffered_samples"),
    }),
    "Memory of the loader": (MEMORY, {
        "batches": figure("batches"),
        "warm-up batches": figure("settled"),
        "MB after warm-up": figure("first_mb"),
        "MB at the end": figure("last_mb"),
        "growth, %": figure("growth_percent"),
        "bytes per batch": figure("slope_bytes_per_batch"),
    }),
    "Opening shards": (OPENING, _SETS | _SECONDS | {"digest of keys and sizes, s": figure("digest_s", ".2f")}),
    "Smaller shards": (SMALLER, {
        "images": shape("image"),
        "shorter side after": shape("shorter"),
        "shards": shape("shards"),
        "two views, CPU ms per image": figure("cpu_ms_per_image", ".2f"),
        "two views, images/s": figure("images_per_s", ".0f"),
        "p20-p80": tables.image_rates(".0f"),
        "KB read per image": figure("kb_per_image", ".0f"),
        "resized images per s and core": figure("resized_per_s_per_core", ".0f"),
    }),
    "Opening a data set on all ranks of a machine": (OPENING_ON_RANKS, _SETS | {"ranks": shape("ranks")} | _SECONDS | {
        "memory of a rank, MB": figure("private_mb", ".1f"),
        "index, MB": figure("index_mb", ".0f"),
        "made in, s": figure("build_s", ".1f"),
    }),
    "Indexing new shards": (INDEXING, _SETS | {
        "provider": tables.provider,
        "samples/s": figure("samples_per_s", ".0f"),
        "per s of CPU time of the busiest process": figure("samples_per_cpu_s", ".0f"),
    }),
}  # fmt: skip
"""Tables by heading: `what` of their records, and their columns."""


def _extrapolate(records: Sequence[Record]) -> str:
    """Return what a further million of samples costs, from the smallest and largest set, and what a billion would."""
    if len(records) < 2:
        return ""
    small, large = records[0], records[-1]
    millions = (float(large.shape["samples"]) - float(small.shape["samples"])) / 1e6
    seconds = ((large.median_ms or 0.0) - (small.median_ms or 0.0)) / 1e3 / millions
    size = 1e6 * (large.figures["private_mb"] - small.figures["private_mb"]) / millions
    return (
        f"\n\nEach further million of samples takes {seconds:.3f} s and {size:,.0f} bytes of a rank's memory. "
        f"At that rate a billion would take {1e3 * seconds:,.0f} s and {1e-3 * size:,.0f} MB."
    )


def streams(records: Sequence[Record]) -> str:
    """Return a table of CPU time, images per second (median, 20th and 80th percentile of the rounds) and waiting times.

    CPU time comes first, because it depends least on what else runs on the machine.
    """
    timed = [record for record in records if record.what in _STREAMS and record.failure is None]
    columns = {
        "stage": _stage,
        "from": _source,
        "provider": tables.provider,
        "CPU ms per image": figure("cpu_ms_per_image", ".2f"),
        "images/s": figure("images_per_s", ".0f"),
        "p20-p80": tables.image_rates(".0f"),
        "per core": figure("images_per_s_per_core", ".0f"),
        "wait p50, ms": figure("batch_p50_ms", ".1f"),
        "wait p99, ms": figure("batch_p99_ms", ".1f"),
    }
    names = ("B", "image", "view")
    shapes = [describe({name: record.shape[name] for name in names}) for record in timed]
    return record_table(timed, columns, shapes) + (_difference(records) if timed else "")


def _stage(record: Record) -> str:
    if record.what != SWEEP:
        return record.what
    return f"{record.what}: {record.shape['threads']} threads, hw_decoder_load {record.shape['hw_decoder_load']}"


def _source(record: Record) -> str:
    source = str(record.shape.get("from", WARM))
    is_partly_cached = record.figures.get("share_left_in_memory", 0) > MAX_SHARE_LEFT_IN_MEMORY
    return f"{source}, partly memory" if is_partly_cached else source


def _difference(records: Sequence[Record]) -> str:
    figures = next((record.figures for record in records if record.what == SAME_VIEWS), None)
    if figures is None:
        return ""
    mean, p99 = figures["mean_difference"], figures["p99_difference"]
    return f" Ours and its plain twin differ by {mean} grey levels on average, {p99:.0f} at the 99th percentile."


def cpu_ratio(baseline: str) -> Metric:
    """Return a metric: CPU time per image of a baseline over ours; the fastest if several names begin with this one."""

    def ratio(records: Sequence[Record]) -> float | None:
        ours, theirs = cpu_ms(records), cpu_ms(records, baseline)
        return theirs / ours if ours and theirs else None

    return ratio


def cpu_ms(records: Sequence[Record], provider: str = OURS) -> float | None:
    """Return the CPU milliseconds per image for two views from memory, on a machine without a GPU.

    It is the least time of the baselines whose name is this one or begins with it and a comma.
    """
    times = [
        record.figures["cpu_ms_per_image"]
        for record in _warm_views(records)
        if "cpu_ms_per_image" in record.figures and not record.machine.get("gpu")
        if record.provider == provider or (provider != OURS and record.provider.startswith(f"{provider}, "))
    ]
    return min(times, default=None)


def _warm_views(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.what == VIEWS and record.shape["from"] == WARM]


def log_share(records: Sequence[Record]) -> float | None:
    """Return the CPU time of logging an image, in percent of the time of all cores per image."""
    logs = [record.figures["cpu_us_per_image"] for record in records if record.what == LOGGING]
    rates = [record.figures["images_per_s_per_core"] for record in _warm_views(records) if record.provider == OURS]
    return 100 * 1e-6 * logs[0] * rates[0] if logs and rates else None


def on_gpu(records: Sequence[Record]) -> float | None:
    """Return our maximum images per second for two views on a GPU with at most CORES cores."""
    ours = [record for record in records if record.what in (VIEWS, SWEEP) and record.provider == OURS]
    on_machine = [record for record in ours if record.machine.get("gpu") and record.machine["cores"] <= CORES]
    return max((record.figures["images_per_s"] for record in on_machine), default=None)


def _last(records: Sequence[Record], what: str) -> Record | None:
    """Return the last record, which is that of the largest data set."""
    return next((record for record in reversed(records) if record.what == what), None)


def _figure(what: str, name: str) -> Metric:
    return lambda records: (last := _last(records, what)) and last.figures[name]


def _seconds(what: str) -> Metric:
    return lambda records: (last := _last(records, what)) and (last.median_ms or 0.0) / 1e3


def speedup_of_processes(records: Sequence[Record]) -> float | None:
    """Return the samples that are indexed in processes over those in the threads of one process, in the same time.

    The time is that of the busiest process's CPU: what else runs on the machine does not count.
    """
    rates = {record.provider: record.figures["samples_per_cpu_s"] for record in records if record.what == INDEXING}
    return rates[OURS] / rates[THREADS] if rates.keys() >= {OURS, THREADS} else None


GOALS = (
    Goal("two views on a CPU: ours, CPU ms per image", 1.75, cpu_ms, is_at_most=True),
    Goal("two views: CPU time of DALI's webdataset pipeline / ours", 2.2, cpu_ratio(DALI_VIEWS)),
    Goal("two views: CPU time of the fastest webdataset + torchvision / ours", 3.5, cpu_ratio(TORCHVISION)),
    Goal("action log: share of the cores' time, %", 1.0, log_share, is_at_most=True),
    Goal("growth of memory over 2,000 batches, %", 2.0, _figure(MEMORY, "growth_percent"), is_at_most=True),
    Goal("opening 1,000 shards of 1.28 million samples, s", 0.5, _seconds(OPENING), is_at_most=True),
    Goal(
        "opening 10,000 shards of 12.8 million samples on 8 ranks, s", 3.0, _seconds(OPENING_ON_RANKS), is_at_most=True
    ),
    Goal(
        "memory of a rank for 12.8 million samples, MB", 30.0, _figure(OPENING_ON_RANKS, "private_mb"), is_at_most=True
    ),
    Goal("indexing new shards: processes / threads, samples per s of the busiest process", 1.7, speedup_of_processes),
    Goal(f"two views on a GPU with {CORES} cores, images/s", 9000.0, on_gpu),
)
