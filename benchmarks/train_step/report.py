"""Report of the training step: names of the records, goals and tables."""

from collections.abc import Sequence

from benchmarks.harness import tables
from benchmarks.harness.goals import Goal, Metric, goal_table
from benchmarks.harness.records import Record
from benchmarks.harness.tables import Column, figure, record_table, shape, time
from iwm_fast.monitoring.step_timer import PHASES

STEP, LOADING, OPS = "training step", "training step with its loader", "training step by operations"

BARE, PLAIN, DDP = "bare loop", "plain engine", "DistributedDataParallel"
ZERO = tuple(f"DeepSpeed ZeRO-{stage}" for stage in range(4))
DEFAULT = ZERO[1]
"""The default engine of a training run."""
COMPILED = ", compiled"
"""Suffix of names: with torch.compile."""
REFERENCE = "reference"
"""The operations of PyTorch."""

CACHED, SHARDS = "batches in memory", "shards"
"""Sources of the batches."""

SMALL, BASE = "ViT-S/16 + 6x192", "ViT-B/16 + 18x384"
"""Encoder and predictor (depth x width) that are measured on a CPU and on a GPU."""

GPU = "H200"
"""The GPU of the goals."""


def sections(records: Sequence[Record], level: str = "###") -> str:
    """Return the non-empty tables under headings of this level, the goals first."""
    timed = [record for record in records if record.what in (STEP, LOADING, OPS) and record.failure is None]
    texts = {"Goals": goal_table(GOALS, records), "Steps": speeds(timed), "Parts of a step, ms": parts(timed)}
    texts["Kernels of a step, ms"] = profiles(timed)
    return tables.sections(texts, records, level)


def speeds(timed: Sequence[Record]) -> str:
    """Return a table of images per second (median, 20th and 80th percentile of the rounds) and of overheads."""
    if not timed:
        return ""
    columns = {
        "ranks": shape("ranks"),
        "provider": _provider,
        "images/s": figure("images_per_s", ".1f"),
        "p20-p80": tables.image_rates(".1f"),
        "ms per step": time("median_ms", ".1f"),
        "baseline": figure("over"),
        "overhead, %": figure("over_percent", ".1f"),
        "MFU, %": figure("mfu_percent", ".1f"),
        "memory, GB": figure("memory_gb", ".1f"),
    }
    peaks = dict.fromkeys(str(record.figures["peak"]) for record in timed if "peak" in record.figures)
    shapes = dict.fromkeys(
        f"networks={record.shape['model']} view={record.shape['view']} B={record.shape['B']} precision={record.dtype}"
        for record in timed
    )
    return f"{record_table(timed, columns)}\n\n{'; '.join([*shapes, *peaks])}."


def _provider(record: Record) -> str:
    return f"{record.shape['engine']}, {record.provider}" if record.what == LOADING else record.provider


def profiles(timed: Sequence[Record]) -> str:
    """Return a table of the milliseconds that kernels of each group take in a step; "" without profiles."""
    profiled = [record for record in timed if "profile_ms" in record.figures]
    groups = dict.fromkeys(name for record in profiled for name in record.figures["profile_ms"])
    rows = [
        [record.provider, *(f"{record.figures['profile_ms'].get(name, 0.0):.2f}" for name in groups)]
        for record in profiled
    ]
    return tables.table(["provider", *groups], rows) if rows else ""


def parts(timed: Sequence[Record]) -> str:
    """Return a table of the milliseconds of each part of a step, and the shares of the step that have goals."""
    columns: dict[str, Column] = {"ranks": shape("ranks"), "provider": _provider}
    columns |= {part.replace("_", " "): figure(f"{part}_ms", ".2f") for part in PHASES}
    columns["wait, %"] = figure("wait_percent", ".2f")
    columns["teacher update, %"] = figure("teacher_update_percent", ".2f")
    return record_table(timed, columns)


def cpu_metric(name: str) -> Metric:
    """Return a function that selects a figure of the default engine on one rank of a machine without a GPU."""

    def metric(records: Sequence[Record]) -> float | None:
        steps = [record for record in _select(records, STEP, SMALL) if not record.machine.get("gpu")]
        default = [step.figures for step in steps if step.provider == DEFAULT and step.shape["ranks"] == 1]
        return default[0].get(name) if default else None

    return metric


def gpu_metric(name: str) -> Metric:
    """Return a function that selects a figure of the default engine in its fastest configuration on the GPU."""

    def metric(records: Sequence[Record]) -> float | None:
        default = [step.figures for step in _select_gpu(records, STEP) if step.provider.startswith(DEFAULT)]
        return max(default, key=lambda figures: figures["images_per_s"], default={}).get(name)

    return metric


def loader_speed_percent(records: Sequence[Record]) -> float | None:
    """Return images per second from shards, in percent of those from a cached batch in the same run."""
    rates = {record.provider: record.figures["images_per_s"] for record in _select_gpu(records, LOADING)}
    return 100 * rates[SHARDS] / rates[CACHED] if {SHARDS, CACHED} <= rates.keys() else None


def loader_wait_percent(records: Sequence[Record]) -> float | None:
    """Return the time that a step waits for its batch from shards, in percent of the step."""
    from_shards = (record for record in _select_gpu(records, LOADING) if record.provider == SHARDS)
    return next((record.figures["wait_percent"] for record in from_shards), None)


def _select_gpu(records: Sequence[Record], what: str) -> list[Record]:
    return [record for record in _select(records, what, BASE) if GPU in str(record.machine.get("gpu"))]


def _select(records: Sequence[Record], what: str, model: str) -> list[Record]:
    return [record for record in records if record.what == what and record.shape["model"] == model]


_UPDATE = "the teacher's update, % of the step"

GOALS = (
    Goal(f"{SMALL} on a CPU: {DEFAULT} over the bare loop, %", 10.0, cpu_metric("over_percent"), is_at_most=True),
    Goal(f"{SMALL} on a CPU: {_UPDATE}", 2.0, cpu_metric("teacher_update_percent"), is_at_most=True),
    Goal(f"{BASE} on an {GPU} from batches in memory, images/s", 2450.0, gpu_metric("images_per_s")),
    Goal(f"{BASE} on an {GPU}: {_UPDATE}", 2.0, gpu_metric("teacher_update_percent"), is_at_most=True),
    Goal(f"{BASE} on an {GPU}: images/s from shards, % of batches in memory", 95.0, loader_speed_percent),
    Goal(f"{BASE} on an {GPU}: wait for shards, % of the step", 1.0, loader_wait_percent, is_at_most=True),
)
