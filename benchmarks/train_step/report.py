"""The training step's measurements: names of the records, goals and tables."""

from collections.abc import Callable, Sequence

from benchmarks.harness.goals import HEADINGS, Goal, verdict
from benchmarks.harness.records import Record
from benchmarks.harness.tables import describe, failures, table
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


def sections(records: Sequence[Record], level: str = "###") -> str:
    """Return every table that has something in it, each under a heading, the goals first."""
    timed = [record for record in records if record.what in (STEP, LOADING) and record.failure is None]
    found = {
        "Goals": table(HEADINGS, goal_rows(records)),
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


GPU = "H200"
"""The card in the goals for one."""

Reached = Callable[[Sequence[Record]], float | None]


def goal_rows(records: Sequence[Record]) -> list[list[str]]:
    """Return a row for each goal: text, wanted, measured, whether it is met."""
    able = [record for record in records if record.failure is None]
    return [[goal.text, *verdict(goal, reached(able))] for goal, reached in _goals()]


def _goals() -> list[tuple[Goal, Reached]]:
    return [
        (_at_most(f"{SMALL} on a CPU: {DEFAULT} over the bare loop, %", 10.0), on_cpu("over_percent")),
        (_at_most(f"{SMALL} on a CPU: the teacher's update, % of the step", 2.0), on_cpu("teacher_update_percent")),
        (_at_least(f"{BASE} on an {GPU} from one cached batch, images/s", 2450.0), on_gpu),
        (_at_most(f"{BASE} on an {GPU}: the teacher's update, % of the step", 2.0), update_on_gpu),
        (_at_least(f"{BASE} on an {GPU}: images/s from shards, % of those", 95.0), from_shards),
        (_at_most(f"{BASE} on an {GPU}: waiting for shards, % of the step", 1.0), waiting),
    ]


def _at_most(text: str, wanted: float) -> Goal:
    return Goal(text, "", {}, "", wanted, is_at_most=True)


def _at_least(text: str, wanted: float) -> Goal:
    return Goal(text, "", {}, "", wanted)


def on_cpu(figure: str) -> Reached:
    """Return how to find a figure of the default engine on one rank of a machine without a GPU."""

    def reached(records: Sequence[Record]) -> float | None:
        fitting = [one for one in _of(records, STEP, SMALL) if one.provider == DEFAULT and one.shape["ranks"] == 1]
        return next((one.figures.get(figure) for one in fitting if not one.machine.get("gpu")), None)

    return reached


def on_gpu(records: Sequence[Record]) -> float | None:
    """Return the most images per second of the default engine, whatever else is switched on."""
    fitting = [one.figures["images_per_s"] for one in _on_card(records, STEP) if one.provider.startswith(DEFAULT)]
    return max(fitting, default=None)


def update_on_gpu(records: Sequence[Record]) -> float | None:
    """Return the teacher's share where the step is shortest."""
    fitting = [one for one in _on_card(records, STEP) if one.provider.startswith(DEFAULT)]
    found = max(fitting, key=lambda one: one.figures["images_per_s"], default=None)
    return None if found is None else found.figures["teacher_update_percent"]


def from_shards(records: Sequence[Record]) -> float | None:
    """Return the loader's images per second over those of a cached batch, in percent, both of one run."""
    speeds = {one.provider: one.figures["images_per_s"] for one in _on_card(records, LOADING)}
    return 100 * speeds[SHARDS] / speeds[CACHED] if {SHARDS, CACHED} <= speeds.keys() else None


def waiting(records: Sequence[Record]) -> float | None:
    """Return the share of the step in which there is no batch."""
    shares = [one.figures["wait_percent"] for one in _on_card(records, LOADING) if one.provider == SHARDS]
    return next(iter(shares), None)


def _on_card(records: Sequence[Record], what: str) -> list[Record]:
    return [one for one in _of(records, what, BASE) if GPU in str(one.machine.get("gpu"))]


def _of(records: Sequence[Record], what: str, model: str) -> list[Record]:
    return [one for one in records if one.what == what and one.shape["model"] == model]
