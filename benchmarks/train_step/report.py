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
    peaks = (str(record.figures["peak"]) for record in timed if "peak" in record.figures)
    shapes = (
        f"networks={record.shape['model']} view={record.shape['view']} B={record.shape['B']} precision={record.dtype}"
        for record in timed
    )
    return record_table(timed, columns, [*shapes, *peaks])


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


def step_metric(model: str, name: str) -> Metric:
    """Return a function that selects a figure of the default engine on one rank, on the GPU of the faster variant."""
    providers = (DEFAULT, DEFAULT + COMPILED) if model == BASE else (DEFAULT,)

    def metric(records: Sequence[Record]) -> float | None:
        steps = [step for step in _select(records, STEP, model) if step.shape["ranks"] == 1]
        default = [step.figures for step in steps if step.provider in providers]
        return max(default, key=lambda figures: figures["images_per_s"], default={}).get(name)

    return metric


def loader_speed_percent(records: Sequence[Record]) -> float | None:
    """Return images per second from shards, in percent of those from a cached batch in the same run."""
    rates = {record.provider: record.figures["images_per_s"] for record in _select(records, LOADING, BASE)}
    return 100 * rates[SHARDS] / rates[CACHED] if {SHARDS, CACHED} <= rates.keys() else None


def loader_wait_percent(records: Sequence[Record]) -> float | None:
    """Return the time that a step waits for its batch from shards, in percent of the step."""
    from_shards = (record for record in _select(records, LOADING, BASE) if record.provider == SHARDS)
    return next((record.figures["wait_percent"] for record in from_shards), None)


def _select(records: Sequence[Record], what: str, model: str) -> list[Record]:
    """Return the records of networks on the machine of their goals: the large ones on the GPU, others without one."""
    selected = [record for record in records if record.what == what and record.shape["model"] == model]
    gpus = [str(record.machine.get("gpu", "")) for record in selected]
    return [record for record, gpu in zip(selected, gpus, strict=True) if (GPU in gpu if model == BASE else not gpu)]


_UPDATE = "the teacher's update, % of the step"

GOALS = (
    Goal(
        f"{SMALL} on a CPU: {DEFAULT} over the bare loop, %", 10.0, step_metric(SMALL, "over_percent"), is_at_most=True
    ),
    Goal(f"{SMALL} on a CPU: {_UPDATE}", 2.0, step_metric(SMALL, "teacher_update_percent"), is_at_most=True),
    Goal(f"{BASE} on an {GPU} from batches in memory, images/s", 2450.0, step_metric(BASE, "images_per_s")),
    Goal(f"{BASE} on an {GPU}: {_UPDATE}", 2.0, step_metric(BASE, "teacher_update_percent"), is_at_most=True),
    Goal(f"{BASE} on an {GPU}: images/s from shards, % of batches in memory", 95.0, loader_speed_percent),
    Goal(f"{BASE} on an {GPU}: wait for shards, % of the step", 1.0, loader_wait_percent, is_at_most=True),
)
