"""The training step's measurements: names of the records, goals and tables."""

from collections.abc import Sequence

from benchmarks.harness import tables
from benchmarks.harness.goals import Goal, Measured, goal_table
from benchmarks.harness.records import Record
from benchmarks.harness.tables import Column, describe, figure, record_table, shape, time
from iwm_fast.monitoring.step_timer import PARTS

STEP, LOADING = "training step", "training step with its loader"

BARE, PLAIN, DDP = "bare loop", "plain engine", "DistributedDataParallel"
ZERO = tuple(f"DeepSpeed ZeRO-{stage}" for stage in range(4))
DEFAULT = ZERO[1]
"""What a run takes if nothing else is said."""
FUSED, COMPILED = ", fused", ", compiled"
"""Endings of names: Triton kernels, torch.compile."""

CACHED, SHARDS = "one cached batch", "shards"
"""Where a loader's batches come from."""

SMALL, BASE = "ViT-S/16 + 6x192", "ViT-B/16 + 18x384"
"""Encoder and predictor: the ones measured on a CPU and on a GPU."""


GPU = "H200"
"""The card in the goals for one."""


def sections(records: Sequence[Record], level: str = "###") -> str:
    """Return every table that has something in it, each under a heading, the goals first."""
    timed = [record for record in records if record.what in (STEP, LOADING) and record.failure is None]
    found = {"Goals": goal_table(GOALS, records), "Steps": speeds(timed), "Parts of a step, ms": parts(timed)}
    return tables.sections(found, records, level)


def speeds(timed: Sequence[Record]) -> str:
    """Return images per second, the 20th and 80th percentile of the turns, and what an engine takes beyond its base."""
    if not timed:
        return ""
    columns = {
        "ranks": shape("ranks"),
        "who": _who,
        "images/s": figure("images_per_s", ".1f"),
        "turns": tables.image_rates(".1f"),
        "ms per step": time("median_ms", ".1f"),
        "over": figure("over"),
        "by, %": figure("over_percent", ".1f"),
        "MFU, %": figure("mfu_percent", ".1f"),
        "memory, GB": figure("memory_gb", ".1f"),
    }
    peaks = dict.fromkeys(str(record.figures["peak"]) for record in timed if "peak" in record.figures)
    about = ({**one.shape, "networks": one.shape["model"], "precision": one.dtype} for one in timed)
    names = ("networks", "view", "B", "precision")
    shapes = dict.fromkeys(describe({name: shape[name] for name in names}) for shape in about)
    return f"{record_table(timed, columns)}\n\n{'; '.join([*shapes, *peaks])}."


def _who(record: Record) -> str:
    return f"{record.shape['engine']}, {record.provider}" if record.what == LOADING else record.provider


def parts(timed: Sequence[Record]) -> str:
    """Return where the time of a step goes, and the shares that have goals."""
    columns: dict[str, Column] = {"ranks": shape("ranks"), "who": _who}
    columns |= {part.replace("_", " "): figure(f"{part}_ms", ".2f") for part in PARTS}
    columns["waiting, %"] = figure("wait_percent", ".2f")
    columns["teacher update, %"] = figure("teacher_update_percent", ".2f")
    return record_table(timed, columns)


def on_cpu(name: str) -> Measured:
    """Return how to find a figure of the default engine on one rank of a machine without a GPU."""

    def measured(records: Sequence[Record]) -> float | None:
        fitting = [one for one in _of(records, STEP, SMALL) if one.provider == DEFAULT and one.shape["ranks"] == 1]
        return next((one.figures.get(name) for one in fitting if not one.machine.get("gpu")), None)

    return measured


def on_gpu(name: str) -> Measured:
    """Return how to find a figure of the default engine where it is fastest, whatever else is switched on."""

    def measured(records: Sequence[Record]) -> float | None:
        fitting = [one.figures for one in _on_card(records, STEP) if one.provider.startswith(DEFAULT)]
        return max(fitting, key=lambda figures: figures["images_per_s"], default={}).get(name)

    return measured


def from_shards(records: Sequence[Record]) -> float | None:
    """Return the loader's images per second over those of a cached batch, in percent, both of one run."""
    speeds = {one.provider: one.figures["images_per_s"] for one in _on_card(records, LOADING)}
    return 100 * speeds[SHARDS] / speeds[CACHED] if {SHARDS, CACHED} <= speeds.keys() else None


def waiting(records: Sequence[Record]) -> float | None:
    """Return the share of the step in which there is no batch."""
    return next((one.figures["wait_percent"] for one in _on_card(records, LOADING) if one.provider == SHARDS), None)


def _on_card(records: Sequence[Record], what: str) -> list[Record]:
    return [one for one in _of(records, what, BASE) if GPU in str(one.machine.get("gpu"))]


def _of(records: Sequence[Record], what: str, model: str) -> list[Record]:
    return [one for one in records if one.what == what and one.shape["model"] == model]


GOALS = (
    Goal(f"{SMALL} on a CPU: {DEFAULT} over the bare loop, %", 10.0, on_cpu("over_percent"), is_at_most=True),
    Goal(
        f"{SMALL} on a CPU: the teacher's update, % of the step", 2.0, on_cpu("teacher_update_percent"), is_at_most=True
    ),
    Goal(f"{BASE} on an {GPU} from one cached batch, images/s", 2450.0, on_gpu("images_per_s")),
    Goal(
        f"{BASE} on an {GPU}: the teacher's update, % of the step",
        2.0,
        on_gpu("teacher_update_percent"),
        is_at_most=True,
    ),
    Goal(f"{BASE} on an {GPU}: images/s from shards, % of those", 95.0, from_shards),
    Goal(f"{BASE} on an {GPU}: waiting for shards, % of the step", 1.0, waiting, is_at_most=True),
)
