"""What the data line is meant to reach, beside what was measured."""

from collections.abc import Callable, Iterable, Sequence

from benchmarks.goals import Goal, verdict
from benchmarks.pipeline_names import LOGGING, MEMORY, OPENING, OURS, PEER, SWEEP, VIEWS, WARM
from benchmarks.records import Record

CORES = 16
"""Of a GPU's share of a machine, in the goal for one."""

HEADINGS = ["goal", "wanted", "measured", "met"]


def rows(records: Sequence[Record]) -> list[list[str]]:
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
